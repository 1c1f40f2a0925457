"""``latentdm completion``: the shell completes commands, options, groups, choices and keys."""

import io
import os
import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib import import_module

import hydra

SCRIPTS = {
    "bash": """\
_latentdm() {
    local line=${COMP_LINE:0:COMP_POINT} behind= found
    local word=${line##* }
    [[ $COMP_WORDBREAKS == *=* ]] && behind=${word%"${word##*=}"}
    COMPREPLY=()
    while IFS= read -r found; do
        [[ $found == *[=./] ]] || found+=" "
        COMPREPLY+=("${found#"$behind"}")
    done < <("$1" completion --query "$line" 2>/dev/null)
}
complete -o nospace -o default -F _latentdm latentdm
""",
    "zsh": """\
_latentdm() {
    local -a found
    found=(${(f)"$("$words[1]" completion --query "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)"})
    if (( $#found )); then
        compadd -S '' -- ${(M)found:#*[=./]}
        compadd -- ${found:#*[=./]}
    else
        compset -P '*='
        _files
    fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
compdef _latentdm latentdm
""",
    "fish": """\
complete -c latentdm -n __fish_use_subcommand -f -a '(latentdm completion --query (commandline -cp))'
complete -c latentdm -n 'not __fish_use_subcommand' -a '(latentdm completion --query (commandline -cp))'
""",
}
"""Shell → what it is to run. Each asks this command, as everything depends on what was chosen before."""

INSTALL = """\
bash: echo 'eval "$(latentdm completion bash)"' >> ~/.bashrc
zsh:  echo 'eval "$(latentdm completion zsh)"' >> ~/.zshrc
fish: latentdm completion fish > ~/.config/fish/completions/latentdm.fish"""


def run(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: the name of a shell, or ``--query`` and the line up to the cursor.
    """
    parser = ArgumentParser(
        prog="latentdm completion",
        description=f"Print what a shell runs to complete the commands of latentdm. {INSTALL}",
    )
    parser.add_argument("shell", nargs="?", choices=SCRIPTS)
    parser.add_argument("--query", metavar="LINE", help="print what may follow; the shells ask this")
    settings = parser.parse_args(list(arguments))
    if settings.query is not None:
        for candidate in candidates(settings.query):
            print(candidate)
    elif settings.shell is not None:
        print(SCRIPTS[settings.shell], end="")
    else:
        parser.error(f"name a shell: {', '.join(SCRIPTS)}")


def candidates(line: str) -> list[str]:
    """What the last word of a line may become; nothing where the shell should complete the names of files.

    Args:
        line: from the name of the program to the cursor.
    """
    from latentdm.cli import COMMANDS  # late, as it names this module

    _, *words = line.split() or [""]
    word = "" if not words or line[-1].isspace() else words.pop()
    if not words:
        return [each for each in (*sorted(COMMANDS), "--help", "--version") if each.startswith(word)]
    command, *before = words
    if command not in COMMANDS:
        return []
    if command == "completion":
        return [shell for shell in SCRIPTS if shell.startswith(word)]
    text = _help(command)
    if before and before[-1] in re.findall(r"(--[\w-]+) [A-Z{]", text):
        return []  # the value of an option
    if word.startswith("-"):
        return [option for option in dict.fromkeys(re.findall(r"--[\w-]+", text)) if option.startswith(word)]
    return _overrides(before, word) if "overrides" in text else []


def _help(command: str) -> str:
    """What a command says of itself, which holds its options."""
    said = io.StringIO()
    with redirect_stdout(said), suppress(SystemExit):
        import_module(f"latentdm.commands.{command}").run(["--help"])
    return said.getvalue()


def _overrides(words: Sequence[str], word: str) -> list[str]:
    """What Hydra makes of a word; nothing where the words before it are wrong.

    Hydra completes through an option of its apps, and takes the line from the environment.

    Args:
        words: in front of it, options among them.
        word: the last one.
    """
    given = ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--config-dir", "--config-name"):
        given.add_argument(option)
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(io.StringIO()), suppress(Exception, SystemExit):
        known, rest = given.parse_known_args(list(words))
        folders = {f"--{name.replace('_', '-')}": value for name, value in vars(known).items() if value}
        line = " ".join(["latentdm", *(each for each in rest if re.match(r"[~+]|[^-][^=]*=", each)), word])
        options = [part for option in folders.items() for part in option]
        with _process(["latentdm", *options, "--shell-completion", "query=fish"], COMP_LINE=line):
            hydra.main(config_path="pkg://latentdm.conf", config_name="train", version_base="1.3")(_nothing)()
    found = dict.fromkeys(said.getvalue().split("\n"))
    # Of the groups, latentdm/ holds the schemas, which only YAMLs name.
    return [each for each in found if each.startswith(word) and each.isprintable() and each not in ("", "latentdm/")]


def _nothing(cfg: object) -> None:
    """The app, which only completes."""


@contextmanager
def _process(arguments: list[str], **environment: str) -> Iterator[None]:
    """The arguments and environment of this process are others for a while."""
    before, left = sys.argv, {name: os.environ.get(name) for name in environment}
    sys.argv = arguments
    os.environ.update(environment)
    try:
        yield
    finally:
        sys.argv = before
        for name, value in left.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
