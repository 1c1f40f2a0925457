"""The commands of ``latentdm``: a module each, named in `latentdm.cli.COMMANDS`.

Each has a ``DESCRIPTION``, ``add_options(parser)``, and ``run(settings)``, which is given what was parsed.
"""
