#!/usr/bin/env bash
# Run by Snakemake in the new environment. Written by envs/lock.py.
set -euo pipefail
python -m pip install --quiet --no-deps staintools==2.1.2
