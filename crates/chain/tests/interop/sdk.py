"""What the official SDK makes of a node: one question per call, the answer as JSON on the last line.

usage: sdk.py ENDPOINT NETUID read | weights MECHANISM | set WALLETS WALLET HOTKEY MECHANISM {"uid": weight}
"""

import asyncio
import json
import sys

import bittensor as bt


async def read(client, netuid):
    neurons = await client.neurons.all(netuid)
    return {
        "block": await client.block(),
        "neurons": [
            {
                "uid": n.uid,
                "hotkey": n.hotkey,
                "coldkey": n.coldkey,
                "stake": n.total_stake.rao,
                "validator_permit": n.validator_permit,
                "last_update": n.last_update,
            }
            for n in neurons
        ],
        "hyperparameters": await client.read("subnet_hyperparameters", netuid=netuid),
        "spec_version": await client.spec_version(),
    }


async def weights(client, netuid, mechanism):
    rows = await client.read("weights", netuid=netuid, mechid=mechanism)
    commits = await client.read("timelocked_weight_commits", netuid=netuid, mechid=mechanism)
    for pending in commits.values():
        for commit in pending:
            del commit["reveals_at"]
    return {"rows": rows, "commits": commits}


async def set_weights(client, netuid, path, wallet, hotkey, mechanism, row):
    intent = bt.SetWeights(
        netuid=netuid,
        weights={int(uid): float(value) for uid, value in json.loads(row).items()},
        mechid=mechanism,
    )
    try:
        result = await client.execute(intent, bt.Wallet(wallet, hotkey, path))
    except bt.ChainError as error:
        return {"success": False, "error": str(error)}
    return {"success": result.success, "error": str(result.error or ""), "block": result.block_hash}


async def main():
    endpoint, netuid, question, *rest = sys.argv[1:]
    async with bt.Subtensor(endpoint, fallback_endpoints=[], archive_endpoints=[]) as client:
        netuid = int(netuid)
        if question == "read":
            answer = await read(client, netuid)
        elif question == "weights":
            answer = await weights(client, netuid, int(rest[0]))
        elif question == "set":
            path, wallet, hotkey, mechanism, row = rest
            answer = await set_weights(client, netuid, path, wallet, hotkey, int(mechanism), row)
        else:
            raise SystemExit(__doc__)
    print(json.dumps(answer, default=str))


asyncio.run(main())
