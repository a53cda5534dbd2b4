"""The command line: flags (`parser`), what they name (`given`), and what each command does (`commands`, `training`).
"""
