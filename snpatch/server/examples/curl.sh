#!/bin/sh
# Show what a server holds; use a patch by name (its first one), streamed too, and a patch in the request: sh curl.sh [URL]
URL=${1:-http://127.0.0.1:8000}
ask() { curl -sS -N "$URL/v1/chat/completions" -H 'Content-Type: application/json' -d "$1"; echo; }

curl -sS "$URL/v1/snpatch"; echo
NAME=$(curl -sS "$URL/v1/snpatch" | python3 -c 'import json, sys; print(next(iter(json.load(sys.stdin)["patches"]), "base"))')
ask '{"model": "'"$NAME"'", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}'
ask '{"model": "'"$NAME"'", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32, "stream": true}'
ask '{"model": "base", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32,
      "snpatch": {"recipient": "sft", "donor": "dpo", "ranking": "safety", "window": 200}}'
