"""Imported last by the fork server that ranks come from (launch.py).

No garbage collection of the server or of a rank looks at what has been imported until now. When the interpreter ends it
would take a second, in which whoever reads the output of a command still waits.
"""

import gc

gc.freeze()
