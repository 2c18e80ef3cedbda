"""A compiler that keeps its object files for the next time that the same text is compiled with the same flags.

python kept_objects.py FOLDER c++ ARGUMENT...
"""

import hashlib
import os
import shutil
import subprocess
import sys

# What tells where files are, and not what they are.
_PLACES = ("-o", "-c", "-MF", "-MT", "-MQ", "-I", "-isystem")


def flags(arguments: list[str]) -> list[str]:
    """Those that an object file follows from beside the preprocessed text."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith(_PLACES):
            kept.append(argument)
        skip = not skip and argument in _PLACES
    return kept


def main(folder: str, compiler: str, *arguments: str) -> int:
    command = [compiler, *arguments]
    if not {"-c", "-o"} <= set(arguments):
        return subprocess.call(command)
    at = arguments.index("-o")
    output, others = arguments[at + 1], [given for given in arguments[:at] + arguments[at + 2 :] if given != "-c"]
    # It writes the list of headers that ninja wants, too: -MD and -MF are among the arguments.
    read = subprocess.run([compiler, "-E", "-P", *others], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if read.returncode:
        return subprocess.call(command)
    version = subprocess.run([compiler, "--version"], stdout=subprocess.PIPE).stdout
    key = hashlib.sha256(repr((version, flags(list(arguments)))).encode() + read.stdout).hexdigest()
    kept = os.path.join(folder, key)
    if os.path.exists(kept):
        os.utime(kept)
    else:
        if failed := subprocess.call(command):
            return failed
        shutil.copy(output, f"{kept}.{os.getpid()}")
        os.rename(f"{kept}.{os.getpid()}", kept)
    shutil.copy(kept, output)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
