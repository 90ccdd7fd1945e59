"""Floor 6: what stands behind the `minipar` command, whose commands and options are in `cli.py`.

In reading order: program (errors, exit codes, ranks), options (made from `TrainConfig`), report (what is printed),
job (train, verify, generate); then a file for each further command.
"""
