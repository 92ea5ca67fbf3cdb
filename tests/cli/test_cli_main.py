"""The program as a whole: help, version, exit codes, and what it costs to start."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import secateur.cli
from secateur.errors import LowCoverage, UsageError


@pytest.fixture
def verb(monkeypatch):
    """Put a function in the place of every verb."""

    def put(act):
        module = type("Module", (), {"run": staticmethod(act)})
        monkeypatch.setattr(secateur.cli.importlib, "import_module", lambda name: module)

    return put


def failing(error):
    def run(words):
        raise error

    return run


def test_help_and_version(cli):
    for word in ("--help", "-h", "help"):
        assert (ran := cli(word)).code == 0 and "evaluate" in ran.out and not ran.err
    ran = cli("--version")
    assert ran.code == 0 and ran.out.startswith("secateur 0.") and "transformers 5." in ran.out
    ran = cli()
    assert ran.code == 2 and not ran.out and "usage: secateur VERB" in ran.err


@pytest.mark.parametrize("name", secateur.cli.VERBS)
def test_help_of_each_verb(cli, name):
    ran = cli(name, "--help")
    assert ran.code == 0 and not ran.err
    assert f"usage: secateur {name}" in ran.out and "--json FILE" in ran.out and "None)" not in ran.out


def test_help_of_prune_shows_the_options_of_methods_and_allocations(cli):
    out = " ".join(cli("prune", "--help").out.replace("│", " ").split())
    for part in ("--sparsegpt.damping", "--wanda.variant", "--owl.outlier", "--nsamples", "arXiv:2301.00774"):
        assert part in out


@pytest.mark.parametrize("words", ["--help", "--version", "evaluate --help", "list --help", "evaluate"])
def test_what_needs_no_torch_does_not_import_it(words):
    code = f"import sys, secateur.cli; secateur.cli.main({words.split()}); sys.exit('torch' in sys.modules)"
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - begun < 5  # 0.1 s on an idle machine; torch alone takes longer than one


def test_unknown_verb_names_the_nearest(cli):
    ran = cli("prnue", "smollm2")
    assert ran.code == 2 and "Did you mean 'prune'?" in ran.error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("too\n  wide"), 2, "secateur: error: too wide"),
        (LowCoverage("only 3 %"), 1, "secateur: error: only 3 %"),
        (KeyError("x"), 1, "secateur: error: unexpected KeyError: 'x'. Add --debug for the traceback."),
        (OSError(28, "No space left on device", "f"), 1, "the system refused: [Errno 28] No space left on device"),
        (MemoryError("8 GB"), 1, "out of memory (8 GB). Less is needed with a smaller --batch-size"),
        (KeyboardInterrupt(), 130, "secateur: stopped by Ctrl-C"),
    ],
)  # fmt: skip
def test_exit_codes(cli, verb, error, code, said):
    verb(failing(error))
    ran = cli("prune")
    assert ran.code == code and not ran.out
    assert said in ran.error


def test_debug_shows_the_traceback_and_the_line(cli, verb):
    verb(failing(UsageError("no")))
    ran = cli("prune", "--debug")
    assert ran.code == 2 and "Traceback" in ran.err and ran.err.endswith("\nsecateur: error: no\n")


def test_warnings_are_one_line_each(cli, verb):
    def run(words):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("first\nsecond", UserWarning, stacklevel=1)
        secateur.cli.logging.getLogger("secateur.models.load").warning("unused %d", 3)
        return 0

    verb(run)
    assert cli("list").err == "secateur: warning: first second\nsecateur: warning: unused 3\n"
    assert not secateur.cli.logging.getLogger("secateur").handlers


def test_a_reader_that_goes_away_is_no_error():
    code = "import sys; from secateur.cli import main; sys.exit(main(['list', 'texts']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None and program.stderr is not None
        program.stdout.close()
        assert (program.stderr.read(), program.wait(60)) == ("", 141)


def test_the_program_is_installed():
    script = Path(sys.executable).with_name("secateur")
    done = subprocess.run([script, "lst"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Did you mean 'list'?" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_sigterm_clears_away():
    code = (
        "import os, signal, sys\n"
        "from secateur.cli import listing, main\n"
        "def run(words):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally:\n"
        "        print('cleared')\n"
        "listing.run = run\n"
        "sys.argv = ['secateur', 'list']\n"
        "sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (143, "cleared\n", "secateur: stopped by SIGTERM\n")
