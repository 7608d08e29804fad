#!/bin/sh
# A runbook for both sides of an air gap, by exit codes, --json and jq. Copy it, and change it.
#   runbook.sh send MODEL MEDIUM     where the Hub is: fetch, pack, copy, prove the copy
#   runbook.sh take MODEL MEDIUM     on the far side: prove, unpack, serve, ask
set -eu
side=$1 model=$2 medium=$3
name=${model##*/}
hfship=${HFSHIP:-hfship}

again() { # run a command until it ends; 3 and 8 can be helped by running it again
    tries=0
    until "$@"; do
        code=$?
        tries=$((tries + 1))
        case $code in 3 | 8) [ "$tries" -lt 10 ] || exit "$code" ;; *) exit "$code" ;; esac
        sleep "${RUNBOOK_PAUSE:-60}"
    done
}

case $side in
send)
    again $hfship fetch -q "$model"
    again $hfship pack -q "$name" --split fat32
    again $hfship push -q "$name" "$medium/"
    $hfship verify "$medium/$name.tar.zst" --quick --json | jq -e 'all(.[]; .ok)' > /dev/null
    $hfship list packages --json | jq -r '.packages[] | [.name, .commit[:12], .state] | @tsv'
    ;;
take)
    $hfship verify "$medium/$name.tar.zst" --json > verify.json || {
        jq -r '.[].damages[]? | "copy again: \(.parts | join(" "))"' verify.json >&2
        exit 6
    }
    again $hfship unpack -q "$medium/$name.tar.zst"
    again $hfship serve -q "$name"
    $hfship status "$name" --json | jq -e 'all(.[]; .state == "healthy")' > /dev/null
    $hfship list models --json | jq -r '.models[] | [.name, .commit[:12], .state] | @tsv'
    ;;
esac
