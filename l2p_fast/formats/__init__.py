"""Files of weights, without any model: every layout an L2P checkpoint comes in <-> our names, shapes and numbers.

    header.py           one safetensors file: its header, the only parser of one
    folder.py           a file, an index, a folder of shards, a pipeline folder -> the files that hold the tensors
    names.py            our names <-> other layouts', both directions
    quantized.py        scales and notes of INT8 and float8 weights
    shapes.py           shapes <-> configuration, by arithmetic
    checkpoint.py       all of these together: `Checkpoint`
    text_encoder.py     a folder's text encoder and tokenizer
    pipeline_folder.py  a pipeline folder's own settings
    values.py           the numbers themselves, in pieces
    write.py            one safetensors file, written in pieces
    lora.py             LoRA files

Opening a `Checkpoint` loads no torch, so a command can say what is wrong with a file before anything heavy is imported.
"""
