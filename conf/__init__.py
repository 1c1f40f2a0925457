"""The config groups of latentdm. An app asks for them with ``hydra.searchpath: [pkg://latentdm.conf]``.

Hydra imports this package when it searches there, before it looks into its store of schemas. So the schemas are in that
store whenever the groups are found, and in no app that did not ask for them.
"""

from latentdm.schemas import register_schemas

register_schemas()
