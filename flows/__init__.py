"""What a user schedules, clicks and types: flows, the command line, tracking and reports."""
