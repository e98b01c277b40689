#!/bin/sh
# fuzz/run.sh TARGET [SECONDS]: fuzzes one target (config, index, safetensors) from the repository's own files.
set -eu
target=$1 seconds=${2:-600}
cd "$(dirname "$0")"
mkdir -p "corpus/$target"
case $target in
    config) for file in ../tests/golden/models/*/config.json ../configs/*.json; do
            [ ! -f "$file" ] || cp "$file" "corpus/config/$(echo "$file" | tr -c 'a-z0-9\n' -)"
        done ;;
    index | safetensors) cp "seeds/$target"/* "corpus/$target/" ;;
    *) echo "no target $target: config, index or safetensors" >&2; exit 2 ;;
esac
# All that is fuzzed is safe Rust, so the address sanitizer would find nothing and halve the speed. Overflow checks and
# debug assertions are on; 512 MB of memory is what an input must not ask for.
cd ..
exec cargo +nightly fuzz run --sanitizer none "$target" -- \
    -max_total_time="$seconds" -dict=fuzz/dictionary.txt -max_len=8192 -rss_limit_mb=512 -timeout=10 -print_final_stats=1
