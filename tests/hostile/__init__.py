"""What strangers and slips of the hand can give, as tables. Nothing of it ends in a traceback or in unbounded work."""
