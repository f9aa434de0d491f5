"""What the official wallet package makes of wallets: one question per call, the answer as JSON on the last line.

usage: wallets.py read PATH WALLET HOTKEY | make PATH WALLET HOTKEY TYPE [PASSWORD] | open CIPHERTEXT_HEX ROUND SIGNATURE_HEX
"""

import json
import sys
from pathlib import Path

import bittensor_core
from bittensor_wallet import Keypair, Wallet

MESSAGE = b"interoperability"


def read(path, wallet, hotkey):
    pair = Wallet(name=wallet, hotkey=hotkey, path=path).hotkey
    return {
        "address": pair.ss58_address,
        "public_key": bytes(pair.public_key).hex(),
        "crypto_type": int(pair.crypto_type),
        "signature": bytes(pair.sign(MESSAGE)).hex(),
    }


def make(path, wallet, hotkey, crypto_type, password=None):
    files = Wallet(name=wallet, hotkey=hotkey, path=path)
    pair = Keypair.create_from_mnemonic(Keypair.generate_mnemonic(), crypto_type=int(crypto_type))
    files.set_hotkey(pair, encrypt=password is not None, overwrite=True, hotkey_password=password)
    return {"address": pair.ss58_address, "file": str(Path(path) / wallet / "hotkeys" / hotkey)}


def open_commit(ciphertext, round_number, signature):
    ciphertext = bytes.fromhex(ciphertext)
    # The package opens its own envelope only: SCALE of { ciphertext: Vec<u8>, round: u64 }. The chain stores the bare ciphertext.
    assert 64 <= len(ciphertext) < 2**14
    length = (len(ciphertext) << 2 | 1).to_bytes(2, "little")
    envelope = length + ciphertext + int(round_number).to_bytes(8, "little")
    return {"plaintext": bytes(bittensor_core.decrypt_with_signature(envelope, signature)).hex()}


QUESTIONS = {"read": read, "make": make, "open": open_commit}
print(json.dumps(QUESTIONS[sys.argv[1]](*sys.argv[2:])))
