"""The file for ms-swift's --external_plugins."""

import ds_moelora.integrations.ms_swift  # noqa: F401
