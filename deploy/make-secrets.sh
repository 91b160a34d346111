#!/bin/sh
# Makes the files that docker-compose.yml mounts as secrets. What is there already stays as it is.
#
#   deploy/make-secrets.sh [DIRECTORY]
set -eu

directory=${1:-$(dirname "$0")/secrets}
mkdir -p "$directory"
# Nobody else may look in; the files themselves are read by the containers' own users.
chmod 700 "$directory"
cd "$directory"

random() {
    head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n'
}

# write NAME TEXT: unless there is such a file
write() {
    [ -e "$1" ] && return
    printf '%s\n' "$2" > "$1"
    chmod 444 "$1"
    echo "made $directory/$1"
}

write postgres_password "$(random)"
write database_url "postgresql://tunesmith:$(cat postgres_password)@postgres:5432/tunesmith"
write redis_password "$(random)"
write broker_url "redis://:$(cat redis_password)@redis:6379/0"
write engine_secret "$(random)"
write grafana_password "$(random)"

# For you to fill in: an AWS credentials file if artifacts are in S3, and an API key for Prometheus.
for name in aws_credentials metrics_key; do
    [ -e "$name" ] && continue
    : > "$name"
    chmod 644 "$name"
    echo "made $directory/$name, which is empty"
done
