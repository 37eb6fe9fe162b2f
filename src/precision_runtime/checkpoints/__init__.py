"""Checkpoints that know the mode they were saved in, and can be carried into another one.

A checkpoint is a folder: ``model.safetensors`` has the weights under the names of ``state_dict()``,
``state.safetensors`` all other tensors, ``state.json`` everything else. Nothing in it is a pickle.

    runtime.probe(model, batch)                 # optional: outputs that must come out again
    runtime.save("run/10", model, optimizer)
    runtime.load("run/10", model, optimizer)    # the same mode: goes on bit by bit
    changes = other.load_across("run/10", model)  # another mode: says what changed, and checks the probe
"""
