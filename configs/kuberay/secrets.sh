#!/bin/sh
# Writes secrets/ beside this file: new random secrets for an installation on Kubernetes.
# Refuses to replace existing ones. Add HF_TOKEN, S3 keys and the like to secrets/weft.env afterwards.
set -eu
umask 077
cd "$(dirname "$0")"
if ! mkdir secrets; then
  echo "secrets/ exists: move it away first to create new keys for all callers" >&2
  exit 1
fi
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
app=$(random)
ray=$(random)
cat > secrets/weft.env <<END
REDIS_URL=redis://app:$app@valkey:6379/0
WEFT_API_KEY=$(random)
WEFT_JWT_SECRET=$(random)
END
cat > secrets/ray.env <<END
auth_token=$(random)
redis_username=ray
redis_password=$ray
END
cat > secrets/valkey.acl <<END
user default off
user app on >$app resetchannels ~weft:* &weft:* -@all +@connection +@transaction +@read +@write +@pubsub +time +ping -@scripting -@dangerous -@admin -keys -sort -restore -migrate -flushall -flushdb +info
END
# Ray's head deletes the key DUMMY when it connects, to find out whether the store is a cluster
cat > secrets/valkey-ray.acl <<END
user default off
user ray on >$ray resetchannels ~RAY* ~DUMMY -@all +@connection +@read +@write +@transaction +@scripting +info -flushall -flushdb
END
echo "secrets/ is written; WEFT_API_KEY in secrets/weft.env is the key that callers send"
