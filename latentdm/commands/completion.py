"""``latentdm completion``: the shell completes commands, options, groups, choices and keys."""

import io
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.completion_plugin import CompletionPlugin

from latentdm.commands.config import add_overrides, initialized

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


DESCRIPTION = f"Print what a shell runs to complete the commands of latentdm. {INSTALL}"


def add_options(parser: ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("shell", nargs="?", choices=SCRIPTS)
    parser.add_argument("--query", metavar="LINE", help="print what may follow; the shells ask this")
    parser.set_defaults(error=parser.error)


def run(settings: Namespace) -> None:
    """Print the script of a shell, or what may follow the line up to the cursor."""
    if settings.query is not None:
        print("".join(f"{candidate}\n" for candidate in candidates(settings.query)), end="")
    elif settings.shell is not None:
        print(SCRIPTS[settings.shell], end="")
    else:
        settings.error(f"name a shell: {', '.join(SCRIPTS)}")


def candidates(line: str) -> list[str]:
    """What the last word of a line may become; nothing where the shell should complete the names of files.

    Args:
        line: from the name of the program to the cursor.
    """
    from latentdm.cli import APART, COMMANDS, parser_of  # late, as it names this module

    _, *words = line.split() or [""]
    word = "" if not words or line[-1].isspace() else words.pop()
    if not words:
        return [each for each in (*sorted(COMMANDS), "--help", "--version") if each.startswith(word)]
    command, *before = words
    if command not in COMMANDS:
        return []
    if command == "completion":
        return [shell for shell in SCRIPTS if shell.startswith(word)]
    text = parser_of(command).format_help()
    if before and before[-1] in re.findall(r"(--[\w-]+) [A-Z{]", text):
        return []  # the value of an option
    if word.startswith("-"):
        return [option for option in dict.fromkeys(re.findall(r"--[\w-]+", text)) if option.startswith(word)]
    return [] if command in APART else _overrides(before, word)


def _overrides(words: Sequence[str], word: str) -> list[str]:
    """What Hydra makes of a word; nothing where the words before it are wrong.

    Args:
        words: in front of it, options among them.
        word: the last one.
    """
    given, found = ArgumentParser(add_help=False, allow_abbrev=False), list[str]()
    add_overrides(given)
    with redirect_stderr(io.StringIO()), suppress(Exception, SystemExit):
        settings, rest = given.parse_known_args(list(words))
        settings.overrides = [each for each in [*settings.overrides, *rest] if re.match(r"[~+]|[^-][^=]*=", each)]
        with initialized(settings) as overrides:
            # Hydra completes for three shells alike, behind what each of them calls.
            plugin: Any = Plugins.instance().discover(CompletionPlugin)[0]
            complete = plugin(GlobalHydra.instance().config_loader())
            found = complete._query(settings.config_name, " ".join([*overrides, word]))
    # Of the groups, latentdm/ holds the schemas, which only YAMLs name.
    return [each for each in found if each.startswith(word) and each.isprintable() and each != "latentdm/"]
