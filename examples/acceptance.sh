#!/bin/sh
# Loads every published checkpoint, encodes, generates and scores with it, and prints a table to send us.
#
#   sh examples/acceptance.sh [--only STEP ...]
#
# This is the first thing to run on a machine with a GPU and the Hub. It downloads about 25 GB. Each step is independent: a
# missing checkpoint is reported, and the other steps run. The table is in $OUT/acceptance.md. The exit status is 1 if a
# check failed. Please open an issue with the table, also if every check passed.
#
# Variables, all optional. A checkpoint is a Hub id or a folder in the published layout:
#   DENSCORE PICKSCORE CLIP_H HPSV2 LONGCLIP SD15 T5 LAVI_BRIDGE LONGSD
#   OUT         folder for the converted checkpoint and the images (runs/acceptance)
#   DEVICE      cuda, cuda:1, mps or cpu (the fastest one)
#   NUM_STEPS   sampling steps (25)
#   HPS_IMAGES  folder with demo_image.jpg and 1.png to 5.png, whose HPS v2 scores are published
#               (downloaded from the issues 19 and 27 of tgxs002/HPSv2 unless HF_HUB_OFFLINE=1)
#   PYTHON      the interpreter (python)
set -u
OUT=${OUT:-runs/acceptance}
mkdir -p "$OUT"
if [ -z "${HPS_IMAGES:-}" ] && [ "${HF_HUB_OFFLINE:-0}" != 1 ]; then
    HPS_IMAGES=$OUT/hps
    mkdir -p "$HPS_IMAGES"
    fetch() { [ -s "$HPS_IMAGES/$1" ] || curl -fsSL -o "$HPS_IMAGES/$1" "$2" || echo "not downloaded: $1" >&2; }
    attachments=https://github.com/tgxs002/HPSv2/assets/38932123
    fetch demo_image.jpg https://raw.githubusercontent.com/tgxs002/HPSv2/master/hpsv2/assets/demo_image.jpg
    fetch 1.png $attachments/56770e89-114f-42e6-aa09-0fa186961697
    fetch 2.png $attachments/0d76ead2-c34e-4f61-8715-0a130ceea761
    fetch 3.png $attachments/ab3909b1-4e76-4cf1-80bd-0f26aeac32a3
    fetch 4.png $attachments/99509cb2-822e-45a4-9312-e83e67f5d799
    fetch 5.png $attachments/7e342f35-5e3a-40ac-87ec-4b15b2a7e1da
fi
exec "${PYTHON:-python}" -m longalign.diagnostics.acceptance --output "$OUT" --num-steps "${NUM_STEPS:-25}" \
    ${DEVICE:+--device "$DEVICE"} ${HPS_IMAGES:+--hps-images "$HPS_IMAGES"} \
    ${DENSCORE:+"denscore=$DENSCORE"} ${PICKSCORE:+"pickscore=$PICKSCORE"} ${CLIP_H:+"clip-h=$CLIP_H"} \
    ${HPSV2:+"hpsv2=$HPSV2"} ${LONGCLIP:+"longclip=$LONGCLIP"} ${SD15:+"sd15=$SD15"} ${T5:+"t5=$T5"} \
    ${LAVI_BRIDGE:+"lavi-bridge=$LAVI_BRIDGE"} ${LONGSD:+"longsd=$LONGSD"} "$@"
