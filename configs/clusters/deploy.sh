#!/bin/sh
# Deploys the fleet on this head's Ray; the unit weft-deploy.service runs it after each start of the head.
# What runs already stays as it is.  deploy.sh [FILE] [options of `serve deploy`]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
file=${1:-fleet.yaml}
[ "$#" -eq 0 ] || shift
cd "$here/../.."
exec "$here/environment.sh" serve deploy "$file" "$@"
