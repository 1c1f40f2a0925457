"""The commands of ``latentdm``: a module each, with ``run(arguments)``, named in `latentdm.cli.COMMANDS`."""
