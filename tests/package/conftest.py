"""Fixtures of the package's tests."""

import pytest

from package.readme import Command, Finished, run_here, write_files


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Run a README command in this process, once, in a folder that holds the README's files."""
    done: dict[str, Finished] = {}

    def run(command: Command) -> Finished:
        if command.text not in done:
            folder = write_files(tmp_path_factory.mktemp("readme"))
            variables = dict(command.variables)
            done[command.text] = run_here(
                command.module, command.arguments, folder, variables.pop("PYTHONPATH", None)
            )
            assert not variables, f"a variable that no test sets: {command.text}"
        return done[command.text]

    return run
