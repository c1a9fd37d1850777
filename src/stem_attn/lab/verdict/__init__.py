"""Result files of other commands in one page that says whether it is worth it."""
