"""The commands of ``latentdm``: each module has a function ``run(arguments)``, and its name in `latentdm.cli.COMMANDS`."""
