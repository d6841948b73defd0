"""The commands that are not the trainer's: a file each, with a `main(arguments) -> exit status`."""
