"""The Flower ClientApp: a node that hosts many holders. Unpack, answer, pack."""

from __future__ import annotations

import dataclasses
import time

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim import provenance
from fedsim.validate import RunError

app = ClientApp()


@app.query()
def identify(message: Message, context: Context) -> Message:
    """Say which node this is (its partition-id) and which code it runs."""
    body = ConfigRecord(
        {"node": int(context.node_config["partition-id"]), "code_hash": provenance.code_hash()}
    )
    return Message(RecordDict({"identity": body}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one step's task for all holders of this node."""
    # Imported here: in deployment each message is a new process, and a query needs none of this.
    from fedsim.engine import holder
    from fedsim.engine.setup import node_for, public_only
    from fedsim.flower import wire
    from fedsim.grads.bookkeeping.memory import retain_freed_memory

    retain_freed_memory()
    began = time.perf_counter()
    task, parameters, setup = wire.unpack_task(message.content)
    unpacked = time.perf_counter() - began
    asked = wire.unpack_asked(context.state)
    try:
        node = node_for(setup, int(context.node_config["partition-id"]))
        with node.alone:  # runs in other threads of this process may share it
            reply = holder.answer(node, task, parameters, asked)
    except Exception as error:
        if not public_only(setup):
            raise
        # Flower sends and logs what an exception says, which may be of the data.
        raise RunError(f"{type(error).__name__} (monitor.public_only withholds what it says)") from None
    context.state[wire.ASKED] = wire.pack_asked(asked)
    reply = dataclasses.replace(reply, seconds={**reply.seconds, "transfer": unpacked})
    return Message(wire.pack_reply(reply), reply_to=message)
