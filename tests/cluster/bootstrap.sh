#!/bin/sh
# What a fresh machine may lack before Python can do the rest: pip and venv.
set -eu
python="$1"
cd "$(dirname "$0")/../.."
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "Python 3.11 or later is needed, $("$python" --version) is here" >&2
    exit 1
fi
if ! "$python" -c 'import pip, venv, ensurepip' 2>/dev/null; then
    echo "  installing Debian packages: python3-pip python3-venv" >&2
    apt-get update -q >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends python3-pip python3-venv >/dev/null
fi
exec "$python" -m tests.cluster.environment
