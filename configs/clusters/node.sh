#!/bin/sh
# Ray on a node, in the foreground; the unit weft-ray@.service runs it:
#   node.sh head      with RAY_REDIS_ADDRESS, RAY_REDIS_USERNAME and RAY_REDIS_PASSWORD of .env its state is in
#                     that store: after a crash it finds its nodes, replicas and applications again
#   node.sh worker
# Further options go to `ray start`, after ours. Ends when one of Ray's processes has died.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
kind=$1
shift
[ ! -r "$here/../../ray.env" ] || . "$here/../../ray.env" # what `ray up` said about this node
exec "$here/environment.sh" sh -eu -c '
kind=$1
shift
case $kind in
  head)
    [ -z "${RAY_REDIS_USERNAME:-}" ] || set -- --redis-username="$RAY_REDIS_USERNAME" "$@"
    [ -z "${RAY_REDIS_PASSWORD:-}" ] || set -- --redis-password="$RAY_REDIS_PASSWORD" "$@"
    # the keys of several clusters in one store begin with their names
    name=$(python -c "import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))[\"cluster_name\"])" \
      "$HOME/ray_bootstrap_config.yaml")
    export RAY_external_storage_namespace="${RAY_external_storage_namespace:-$name}"
    exec ray start --head --block --port=6379 --object-manager-port=8076 --num-gpus=0 \
      --dashboard-host=127.0.0.1 --autoscaling-config="$HOME/ray_bootstrap_config.yaml" "$@"
    ;;
  worker)
    unset RAY_REDIS_ADDRESS RAY_REDIS_USERNAME RAY_REDIS_PASSWORD
    exec ray start --block --address="$RAY_HEAD_IP:6379" --object-manager-port=8076 "$@"
    ;;
  *)
    echo "$kind is neither head nor worker" >&2
    exit 2
    ;;
esac' node "$kind" "$@"
