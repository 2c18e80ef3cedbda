"""A pytest plugin: a line for every file of tests, once all of them have run, instead of a dot for every test.

Also where pytest-xdist runs files side by side. What fails is told at once.
"""

import collections
import time


class Progress:
    def __init__(self, config):
        self.config = config
        self.left = collections.Counter()  # tests of a file that have not run yet
        self.results = collections.defaultdict(collections.Counter)
        self.seconds = collections.Counter()
        self.begin = time.monotonic()

    def expect(self, nodeids) -> None:
        if not self.left:
            self.left.update(nodeid.partition("::")[0] for nodeid in nodeids)

    def pytest_collection_finish(self, session) -> None:
        self.expect(item.nodeid for item in session.items)

    def pytest_report_teststatus(self, report):
        """No dots."""
        if report.when == "call" and report.passed:
            return "passed", "", "PASSED"
        if report.skipped:
            return "skipped", "", "SKIPPED"
        return None

    def pytest_runtest_logreport(self, report) -> None:
        file = report.nodeid.partition("::")[0]
        self.seconds[file] += report.duration
        if report.failed:
            self.results[file]["failed"] += 1
            self._write(f"{report.nodeid} FAILED at {report.when}")
        elif report.skipped or report.when == "call":
            self.results[file][report.outcome] += 1
        if report.when == "teardown":
            self.left[file] -= 1
            if self.left[file] == 0:
                told = ", ".join(f"{count} {word}" for word, count in sorted(self.results[file].items()))
                now = time.monotonic() - self.begin
                self._write(f"{now:5.0f} s  {file}: {told} in {self.seconds[file]:.1f} s")

    def _write(self, line: str) -> None:
        terminal = self.config.pluginmanager.getplugin("terminalreporter")
        terminal.ensure_newline()
        terminal.write_line(line, flush=True)


class AcrossWorkers(Progress):
    def pytest_xdist_node_collection_finished(self, node, ids) -> None:
        self.expect(ids)


def watch(config) -> None:
    """Where this process reports: not in a worker of xdist."""
    if not hasattr(config, "workerinput"):
        kind = AcrossWorkers if config.pluginmanager.hasplugin("xdist") else Progress
        config.pluginmanager.register(kind(config), "tp_fused-progress")
