#!/bin/bash
# Cloud TPU's queued resources as a file: FOLDER/state, and FOLDER/calls of what was asked for.
# The first slice is taken away while it trains; the second one finishes. Now and then Google does
# not answer: FOLDER/hiccups has the numbers of the calls that fail for no reason of the slice's.
folder=$(dirname "$0")
verb=$4
echo "$verb" >>"$folder/calls"
if grep -qx "$(grep -c . "$folder/calls")" "$folder/hiccups" 2>/dev/null; then
  echo "ERROR: (gcloud) There was a problem refreshing your current auth tokens" >&2
  exit 1
fi
case $verb in
  create)
    echo ACTIVE >"$folder/state"
    rm -f "$folder/installed"
    ;;
  scp) touch "$folder/installed" ;;
  delete) rm -f "$folder/state" ;;
  describe)
    cat "$folder/state" 2>/dev/null || {
      echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2
      exit 1
    }
    ;;
  ssh)
    case "$*" in
      *is-active*)
        if [ ! -e "$folder/installed" ]; then
          echo inactive
        elif [ "$(grep -c create "$folder/calls")" = 1 ]; then
          echo SUSPENDED >"$folder/state"
          echo active
        else
          echo inactive
        fi
        ;;
    esac
    ;;
esac
