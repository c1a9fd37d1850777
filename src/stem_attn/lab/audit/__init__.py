"""How often the interval of an audit holds the truth, and what an audit costs."""
