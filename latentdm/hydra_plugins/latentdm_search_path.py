"""Makes the config groups of latentdm, and their schemas, known to every Hydra app of the environment.

Installed as ``hydra_plugins.latentdm_search_path``, the namespace that Hydra scans. Kept light: Hydra imports it at
every start, so neither torch nor lightning may be imported from here.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from latentdm.schemas import register_schemas

register_schemas()


class LatentdmSearchPath(SearchPathPlugin):
    """Appends ``pkg://latentdm.conf``: an app's own config of the same name comes first and wins."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Hydra calls this once at start-up."""
        search_path.append(provider="latentdm", path="pkg://latentdm.conf")
