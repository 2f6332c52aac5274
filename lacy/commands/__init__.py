"""The commands, a module for each group. Each command imports what it needs when it runs."""
