#!/bin/sh
# HTTPS on the head: installs Caddy, which gets a certificate for WEFT_PUBLIC_URL of .env from Let's Encrypt.
# Ports 80 and 443 of the head must be open, and its name must lead to it. Run again after a change of .env.
set -eu
here=$(cd "$(dirname "$0")" && pwd)

refuse() {
  echo "$1" >&2
  exit 2
}

value_of() {
  "$here/environment.sh" sh -c "echo \"\${$1:-}\""
}

url=$(value_of WEFT_PUBLIC_URL)
case $url in
  https://?*) ;;
  *) refuse "WEFT_PUBLIC_URL of .env must be https:// and a name, such as https://weft.example.org" ;;
esac
[ -n "$(value_of WEFT_API_KEY)" ] || refuse "WEFT_API_KEY is not in .env: without a key Weft answers no caller of Caddy's"
case ",$(value_of WEFT_TRUSTED_PROXIES | tr -d ' ')," in
  *,127.0.0.1,* | *,127.0.0.0/8,*) ;;
  *) refuse "WEFT_TRUSTED_PROXIES of .env must have 127.0.0.1: else all callers are one to Weft" ;;
esac

command -v caddy > /dev/null || { sudo apt-get -qq update && sudo apt-get -qq install -y caddy; }
sudo cp "$here/Caddyfile" /etc/caddy/Caddyfile
sudo mkdir -p /etc/systemd/system/caddy.service.d
printf '[Service]\nEnvironment=WEFT_PUBLIC_URL=%s\n' "$url" |
  sudo tee /etc/systemd/system/caddy.service.d/weft.conf > /dev/null
sudo systemctl daemon-reload
sudo systemctl enable --quiet caddy
sudo systemctl restart caddy
