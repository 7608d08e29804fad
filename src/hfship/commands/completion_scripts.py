# SPDX-License-Identifier: Apache-2.0
"""What makes bash, zsh and fish complete hfship: each asks the program (commands/candidates).

Each script completes `hfship`, `hfship.pyz` by any path, and `python3 .../hfship.pyz`; what other
scripts of Python get stays as it was.
"""

from __future__ import annotations

from typing import Mapping

BASH = r"""# bash completion of hfship; it asks the program that is typed.

_hfship() {
  local at=0 how line
  local -a call lines
  if [[ ${COMP_WORDS[0]##*/} == python* ]]; then
    if [[ $COMP_CWORD -lt 2 || ! ${COMP_WORDS[1]##*/} =~ ^hfship.*\.pyz?$ ]]; then
      _hfship_of_python "$@"
      return
    fi
    at=1
  fi
  for line in "${COMP_WORDS[@]:0:at+1}"; do call+=("${line/#\~\//$HOME/}"); done
  mapfile -t lines < <(
    "${call[@]}" completion --words -- "${COMP_WORDS[@]:at+1:COMP_CWORD-at}" 2>/dev/null
  )
  how=${lines[0]-}
  COMPREPLY=()
  for line in "${lines[@]:1}"; do COMPREPLY+=("${line%%$'\t'*}"); done
  local current=${COMP_WORDS[COMP_CWORD]}
  if [[ $current == = ]]; then current=; fi
  local -a own=()
  if [[ $how == files ]]; then mapfile -t own < <(compgen -f -- "$current"); fi
  if [[ $how == dirs ]]; then mapfile -t own < <(compgen -d -- "$current"); fi
  if [[ ${#own[@]} -gt 0 ]]; then
    compopt -o filenames 2>/dev/null
    COMPREPLY+=("${own[@]}")
  fi
  if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == */ ]]; then compopt -o nospace 2>/dev/null; fi
}

# Other scripts of Python: bash-completion brings theirs at the first TAB, in the place of ours.
_hfship_of_python() {
  local loader name=${1##*/}
  if [[ -z ${_hfship_before-} ]]; then
    _hfship_before=none
    for loader in _comp_load _completion_loader; do
      if declare -F "$loader" >/dev/null; then
        "$loader" "$name" >/dev/null 2>&1
        _hfship_before=$(complete -p "$name" 2>/dev/null)
        break
      fi
    done
    _hfship_register
  fi
  local before=${_hfship_before#*-F }
  before=${before%% *}
  if [[ $before != _hfship ]] && declare -F "$before" >/dev/null; then "$before" "$@"; fi
}

_hfship_register() {
  complete -F _hfship hfship hfship.pyz
  complete -o bashdefault -o default -F _hfship python python3 python3.{8..15}
}

_hfship_register
"""

ZSH = r"""#compdef hfship hfship.pyz -p python[0-9.]#
# zsh completion of hfship; it asks the program that is typed.

_hfship() {
  local at=1 how line word
  local -a call rest lines names shown folders
  call=(${~${(Q)words[1]}})
  if [[ ${call[1]:t} == python* ]]; then
    if (( CURRENT < 3 )) || [[ ${${(Q)words[2]}:t} != hfship*.(py|pyz) ]]; then
      autoload -Uz _python
      _python "$@" 2>/dev/null || _default "$@"
      return
    fi
    call+=(${~${(Q)words[2]}})
    at=2
  fi
  rest=("${(@Q)words[at+1,CURRENT]}")
  lines=("${(@f)$("${call[@]}" completion --words -- "${rest[@]}" 2>/dev/null)}")
  how=${lines[1]}
  for line in "${(@)lines[2,-1]}"; do
    word=${line%%$'\t'*}
    if [[ $word == */ ]]; then folders+=("$word"); continue; fi
    names+=("$word")
    shown+=("${(r:24:)word}  ${line#*$'\t'}")
  done
  local found=1
  if (( $#names )); then compadd -l -d shown -a names && found=0; fi
  if (( $#folders )); then compadd -S '' -a folders && found=0; fi
  case $how in
    files) _files && found=0 ;;
    dirs) _files -/ && found=0 ;;
  esac
  return found
}

if [[ ${funcstack[1]} == _hfship ]]; then
  _hfship "$@"
else
  compdef _hfship hfship hfship.pyz -p 'python[0-9.]#'
fi
"""

FISH = r"""# fish completion of hfship; it asks the program that is typed.

# The words that call hfship: `hfship`, or `python3 hfship.pyz`; none for another script.
function __hfship_call
    set -l words (commandline -opc)
    set -l call $words[1]
    if string match -qr '^python' -- (basename -- $call)
        test (count $words) -ge 2; or return 1
        string match -qr '^hfship.*\.pyz?$' -- (basename -- $words[2]); or return 1
        set call $words[1..2]
    end
    string replace -r '^~/' "$HOME/" -- $call
    return 0 # also where nothing was to be replaced
end

function __hfship_complete
    set -l call (__hfship_call); or return
    set -l words (commandline -opc)
    set -e words[1..(count $call)]
    set -l current (commandline -ct)
    set -l lines ($call completion --words -- $words "$current" 2>/dev/null)
    set -l how $lines[1]
    set -e lines[1]
    printf '%s\n' $lines
    switch "$how"
        case files
            __fish_complete_path "$current"
        case dirs
            __fish_complete_directories "$current"
    end
end

for name in hfship hfship.pyz
    complete -c $name -f -a '(__hfship_complete)'
end
for name in python python3 python3.{8,9,10,11,12,13,14,15}
    complete -c $name -n '__hfship_call >/dev/null' -f -a '(__hfship_complete)'
end
"""

SCRIPTS: Mapping[str, str] = {"bash": BASH, "zsh": ZSH, "fish": FISH}
