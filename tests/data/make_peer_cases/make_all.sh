#!/bin/sh
# Every case, each tool in its own environment under PEERS (see README.md), then the reference logits.
set -e
cd "$(dirname "$0")"
PEERS=${PEERS:-/tmp/peers}
"$PEERS/gptq/bin/python" make_gptq.py
"$PEERS/autogptq/bin/python" make_autogptq.py
"$PEERS/awq/bin/python" make_awq.py
"$PEERS/awq/bin/python" make_dense.py old
"$PEERS/ct/bin/python" make_dense.py new
"$PEERS/ct/bin/python" make_ct.py
"$PEERS/ctold/bin/python" make_ctold.py
"$PEERS/ct/bin/python" make_fp8.py
"$PEERS/ct/bin/python" reference.py
