#!/bin/sh
# Prepares an instance for an image of all nodes: packages of the system, the virtual environment with torch.
# A node of that image starts without installing some GB of packages, and without asking a registry.
# On a fresh instance of the image that the cluster file names, with the repository in ~/weft and no .env:
#   ~/weft/configs/clusters/bake.sh s3 boto3                        # AWS
#   ~/weft/configs/clusters/bake.sh s3 google-api-python-client     # Google
# Then make the image (docs/operations.md). Never of a node of a cluster: it has secrets, and units that start.
set -eu
weft=$(cd "$(dirname "$0")/../.." && pwd)
for secret in "$weft/.env" "$weft/ray.env" "$HOME/.ray/auth_token" "$HOME/ray_bootstrap_key.pem"; do
  if [ -e "$secret" ]; then
    echo "$secret is here: this is a node, not a fresh instance; its image would carry its secrets" >&2
    exit 2
  fi
done
extra=$1
client=$2
sudo cloud-init status --wait || true
sudo apt-get -qq update
sudo apt-get -qq install -y python3-venv nfs-common caddy
sudo systemctl disable --now caddy # tls.sh enables it where it is wanted
python3 -m venv "$weft/.venv"
cd "$weft"
.venv/bin/pip install --quiet -c constraints.txt --editable ".[$extra]" "$client"
.venv/bin/python -c "import torch; print('torch', torch.__version__, 'for CUDA', torch.version.cuda)"
sudo rm -rf /var/lib/apt/lists/* "$HOME/.cache/pip"
sudo cloud-init clean --logs # the next boot is a first one
