#!/bin/sh
# Runs a command with the environment of Weft's Ray processes on a node of a cluster:
#   environment.sh ray start ...
# Reads .env, in the folder two above this one: lines NAME=value, or NAME='value' where the value has spaces
# or a $. Ends with status 2 and one line on stderr where a variable is missing or cannot be used.
set -eu
weft=$(cd "$(dirname "$0")/../.." && pwd)

refuse() {
  echo "$weft/.env: $1" >&2
  exit 2
}

# Ray's autoscaler, a process of the head, inherits this environment and calls the cloud by boto3, which takes
# AWS_... before the role of the instance: it would start no node with keys that are for the bucket of results,
# nor at an address that is its storage's. Settings take the other names too.
rename() {
  eval "value=\${$1:-} other=\${$2:-}"
  [ -z "$value" ] || [ -n "$other" ] || export "$2=$value"
  unset "$1" value other
}

[ -r "$weft/.env" ] || refuse "cannot be read; cluster.yaml says what it holds"
set -a
. "$weft/.env"
set +a
: "${REDIS_URL:=${WEFT_REDIS_URL:-}}"
[ -n "$REDIS_URL" ] || refuse "REDIS_URL is missing: jobs of a cluster are in a store of their own"
export REDIS_URL
[ -z "${AWS_SESSION_TOKEN:-}" ] || refuse "AWS_SESSION_TOKEN: keys that end within hours; use a role or lasting keys"
for name in AWS_PROFILE AWS_DEFAULT_PROFILE AWS_SHARED_CREDENTIALS_FILE AWS_CONFIG_FILE AWS_ROLE_ARN; do
  eval "value=\${$name:-}"
  [ -z "$value" ] || refuse "$name: Ray would use it in place of the node's role; use the role, or keys"
done
rename AWS_ACCESS_KEY_ID WEFT_AWS_ACCESS_KEY_ID
rename AWS_SECRET_ACCESS_KEY WEFT_AWS_SECRET_ACCESS_KEY
rename AWS_ENDPOINT_URL WEFT_S3_ENDPOINT_URL
rename AWS_REGION WEFT_S3_REGION
rename AWS_DEFAULT_REGION WEFT_S3_REGION

# where replicas read that the cloud takes their node back
: "${WEFT_METADATA_URL:=http://169.254.169.254}"
export WEFT_METADATA_URL

# weights and compiled code, on the mount that outlives a node
: "${HF_HOME:=/mnt/models/huggingface}" "${WEFT_MODEL_CACHE:=/mnt/models/weft}"
export HF_HOME WEFT_MODEL_CACHE RAY_AUTH_MODE=token PATH="$weft/.venv/bin:$PATH"
ulimit -S -n "$(ulimit -H -n)" # Ray opens many files; the usual soft limit is 1024
exec "$@"
