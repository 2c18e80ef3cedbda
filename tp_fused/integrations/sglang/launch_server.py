"""`python -m tp_fused.integrations.sglang.launch_server ...`: sglang.launch_server, with the plugin.

For releases that load no plugins (0.5.6). The processes that SGLang starts import this module again, as they do the
program's main one: so the plugin is theirs, too.
"""

import runpy

from tp_fused.integrations.sglang import plugin

plugin()

if __name__ == "__main__":
    # This module stays the main one: it is what the processes started from here import.
    runpy.run_module("sglang.launch_server", run_name="__main__")
