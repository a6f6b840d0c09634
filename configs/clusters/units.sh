#!/bin/sh
# Installs the systemd units of a node and starts them; they start Ray again after a crash and after a reboot.
#   units.sh head      Ray's head, and the applications of fleet.yaml after each of its starts
#   units.sh worker
# Run by `ray up` and, on workers, by Ray's autoscaler.
set -eu
kind=$1
weft=$(cd "$(dirname "$0")/../.." && pwd)
case $kind in
  head) units="weft-ray@head.service weft-deploy.service" ;;
  worker) units="weft-ray@worker.service" ;;
  *)
    echo "$kind is neither head nor worker" >&2
    exit 2
    ;;
esac

"$weft/configs/clusters/environment.sh" true # a mistake in .env is reported here, not in a journal
# the instance, its type and resources, as `ray up` exports them: a later start needs them too, and so does one
# after this was run by hand
if [ -n "${RAY_CLOUD_INSTANCE_ID:-}" ] || [ ! -e "$weft/ray.env" ]; then
  (umask 077 && export -p | sed -n '/^export RAY_/p' > "$weft/ray.env")
fi
for file in weft-ray@.service weft-deploy.service; do
  sed -e "s|@weft@|$weft|g" -e "s|@user@|$(id -un)|g" \
    "$weft/configs/clusters/$file" | sudo tee "/etc/systemd/system/$file" > /dev/null
done
sudo systemctl daemon-reload
sudo systemctl enable --quiet $units
sudo systemctl restart --no-block $units
