"""The fast recurrence of known cells; README.md in this folder explains it."""
