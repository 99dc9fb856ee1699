"""Selective training: what was chosen, the change that makes it train, and the schedule that takes turns."""
