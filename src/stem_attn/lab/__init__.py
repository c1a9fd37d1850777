"""What measures: a folder an experiment (command, run, report), and beside them what they share."""
