#!/usr/bin/env bash
# The runs of RESULTS.md, each with seeds 1 to 3, without "bf16 against fp32". Many hours on two
# CPU cores. First: python data/prepare.py --quora small (else it trains on the sample).
#
#     bash results/run.sh                  # everything, into runs/ and report/
#     bash results/run.sh scores report    # some of: scores methods ensemble studies report speed
#     SEEDS=1 MORE="--epochs 1 --steps_per_epoch 2 --runs_dir /tmp/r" bash results/run.sh scores  # try
#
# Prints each command. Started again, it trains no finished run again and resumes a stopped one.
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-1 2 3}
MORE=${MORE:-}

show() {
    echo "+ $*"
    "$@"
}

train() { # MODE NAME FLAG ...: one run of each seed; the word SEED in a flag becomes the seed
    local mode=$1 name=$2 seed
    shift 2
    for seed in $SEEDS; do
        [ -e "runs/$mode-$name-seed$seed/predictions" ] ||
            show python multitask_classifier.py --fine-tune-mode "$mode" "${@//SEED/$seed}" $MORE \
                --seed "$seed" --model_file_suffix "$name-seed$seed" --resume
    done
}

scores() { # the recipes, and surgery
    local short=(--pretrained bundled --batch_size 16 --epochs 2 --steps_per_epoch 200)
    train last-linear-layer baseline "${short[@]}" --recipe baseline
    train full-model cosine "${short[@]}" --recipe cosine
    train full-model simcse "${short[@]}" --recipe simcse
    train LoRA simcse-lora "${short[@]}" --recipe simcse-lora
    train full-model simcse-full "${short[@]}" --recipe simcse-full
    train full-model surgery "${short[@]}" --recipe simcse-full --gradient_surgery
    train full-model best --pretrained bundled --recipe best
}

methods() { # one method a row, each beside plain full-model or LoRA
    local budget=(--batch_size 8 --epochs 1 --steps_per_epoch 300 --calibration_examples 500)
    local short=(--pretrained bundled "${budget[@]}") stage
    local simcse=(--unsupervised_simcse --loss_weights simcse_{sst,para,sts}=0.3)
    train full-model plain "${short[@]}"
    train LoRA plain "${short[@]}"
    train LoRA rslora "${short[@]}" --LoRA_variant rslora
    train LoRA loraplus "${short[@]}" --LoRA_lr_ratio 16 --lr 1.25e-4
    train LoRA dora "${short[@]}" --LoRA_variant dora
    train PAL plain "${short[@]}"
    train full-model pals "${short[@]}" --pals
    train full-model proportional "${short[@]}" --sampling proportional
    train full-model annealed "${short[@]}" --sampling annealed --epochs 2 --steps_per_epoch 150
    train full-model surgery-sum "${short[@]}" --gradient_surgery
    train full-model surgery-vaccine "${short[@]}" --gradient_surgery vaccine
    train full-model simcse-03 "${short[@]}" "${simcse[@]}"
    train full-model surgery-main "${short[@]}" "${simcse[@]}" --gradient_surgery main
    train full-model mlm-aux "${short[@]}" --mlm sst para sts --loss_weights mlm_{sst,para,sts}=0.1
    train full-model mlm-sst "${short[@]}" --tasks sst --mlm sst --loss_weights sst=0
    train full-model mlm-cfimdb "${short[@]}" --tasks sst cfimdb --mlm sst cfimdb \
        --loss_weights sst=0 cfimdb=0 --max_length 128
    train full-model mlm-all "${short[@]}" --mlm sst para sts --loss_weights {sst,para,sts}=0
    for stage in sst cfimdb all; do
        train full-model "after-mlm-$stage" "${budget[@]}" \
            --start_from "runs/full-model-mlm-$stage-seedSEED"
    done
}

ensemble() { # one `best`, two runs for paraphrase, two for the other tasks
    local joint=(--pretrained bundled --recipe best --tasks para --pair_encoding joint --epochs 8)
    local both=(--pretrained bundled --recipe best --tasks sst sts --steps_per_epoch 250)
    SEEDS=1 train full-model best --pretrained bundled --recipe best
    SEEDS=6 train full-model para-joint "${joint[@]}" --steps_per_epoch 300
    SEEDS=6 train full-model para-swap "${joint[@]}" --steps_per_epoch 300 --swap_pairs
    SEEDS=7 train full-model sst-sts "${both[@]}" --pair_encoding sts=joint --epochs 4
    SEEDS=8 train full-model sst-sts-both "${both[@]}" --pair_encoding sts=both --epochs 5
    show python evaluation.py --predictions_dir predictions/ensemble --checkpoint \
        runs/full-model-{best-seed1,para-joint-seed6,para-swap-seed6,sst-sts-seed7,sst-sts-both-seed8}
}

studies() { # LoRA's rank and scale; group words
    show python -m studies.lora_sweep --ranks 1 2 4 8 16 32 64 --runs_dir runs/sweep \
        --out report/sweep -- --pretrained bundled --batch_size 16 --epochs 1 \
        --steps_per_epoch 150 --calibration_examples 0 $MORE
    show python -m studies.bias_probe runs/full-model-best-seed1 --out report/bias.md
}

report() { # tables and pictures of all runs but those of `studies`; the files of `best`
    local finished=(runs/*/predictions)
    show python evaluation.py --report "${finished[@]%/predictions}"
    show python evaluation.py --checkpoint runs/full-model-best-seed1
}

speed() { # beside `transformers` and `peft`, on a machine that does nothing else
    show python benchmarks/throughput.py --startup --rows '*simcse-16-*' 'last*16-default' \
        evaluation-16-default --eval_examples 0
}

(($#)) || set -- scores methods ensemble studies report speed
for part; do
    "$part"
done
