"""Signatures of bundles and shards, judged by openssl, and newer shards in place of older ones, also when the power goes away."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
from node_rig import HIDDEN, Observer, make_bundle
from test_delivery import Rig, Stop, local, request, slow, stop_beyond
from test_delivery_frames import Node, chunks

from ground_station import bundle_sign, cli
from ground_station.broker import Broker
from ground_station.delivery import DeliveryRefused
from node_agent import config, delivery_frame, delivery_store, experts, frame, shard, signature
from node_agent.delivery import Receiver
from node_agent.delivery_frame import DONE, OFFER, REFUSED, STATE, Message, Offer, Shard
from node_agent.errors import ConfigError, ExpertError

STEM = "L01E002.int8"


def openssl(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=20)


def new_key(path):
    assert openssl("genpkey", "-algorithm", "ed25519", "-out", path).returncode == 0
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return new_key(folder / "fleet.key"), new_key(folder / "other.key")


@pytest.fixture(scope="module")
def signer(keys):
    return bundle_sign.signer_of(bundle_sign.load_key(keys[0]))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, keys):
    made = make_bundle(tmp_path_factory.mktemp("bundle"))
    bundle_sign.sign(made.root, bundle_sign.load_key(keys[0]))
    return made


@pytest.fixture(scope="module")
def newer(tmp_path_factory, keys):
    """The same bundle with other weights: its graphs are the same files, its weights are not."""
    made = make_bundle(tmp_path_factory.mktemp("newer"), seed=2)
    bundle_sign.sign(made.root, bundle_sign.load_key(keys[0]))
    return made


def signed_offer(bundle, stem=STEM) -> Offer:
    manifest = shard.read_manifest(bundle.root)
    which = Shard(int(stem[1:3]), int(stem[4:7]), stem[8:])
    files = manifest.shard(which.layer, which.expert, which.precision).files
    made = signature.read_shard_signatures(bundle.root).signatures[stem]
    return Offer(which, HIDDEN, manifest.name, files, made)


def trusting(root, *signers) -> Node:
    node = Node(root)
    node.receiver = Receiver(
        node.store,
        node.experts,
        node.counters,
        10**12,
        node.changes.append,
        lambda *error: node.reported.append(error),
        signature.Trust(signers),
    )
    return node


def send(node, bundle, offer) -> list[Message]:
    said = node.say(Message(OFFER, 1, offer=offer))
    if said[-1].kind == STATE:
        for chunk in chunks(bundle, offer):
            if said[0].have[chunk.index].bytes < offer.files[chunk.index].bytes:
                said += node.say(chunk)
    return said


# ------------------------------------------------------------ what is signed, judged by openssl


def test_openssl_finds_the_signatures_right_and_a_flipped_bit_wrong(bundle, keys, tmp_path):
    """The statement about a shard is written here from its description, not by the code that signs."""

    def verified(key, signed: bytes, made: bytes) -> bool:
        (tmp_path / "signed").write_bytes(signed)
        (tmp_path / "made").write_bytes(made)
        assert openssl("pkey", "-in", key, "-pubout", "-out", tmp_path / "pub").returncode == 0
        files = ("-inkey", tmp_path / "pub", "-sigfile", tmp_path / "made", "-in", tmp_path / "signed")
        return openssl("pkeyutl", "-verify", "-rawin", "-pubin", *files).returncode == 0

    manifest = (bundle.root / "manifest.json").read_bytes()
    made = (bundle.root / "manifest.sig").read_bytes()
    assert len(made) == 64 and verified(keys[0], manifest, made)
    assert not verified(keys[1], manifest, made)
    assert not verified(keys[0], manifest[:50] + bytes([manifest[50] ^ 1]) + manifest[51:], made)
    tree = json.loads(manifest)
    made_of = json.loads((bundle.root / "shards.sig").read_text())["shards"]
    assert len(made_of) == len(tree["shards"]) == len(bundle.stems)
    (entry,) = (e for e in tree["shards"] if (e["layer"], e["expert"], e["precision"]) == (1, 2, "int8"))
    rows = ",".join(f'["{f["path"]}",{f["bytes"]},"{f["sha256"]}"]' for f in entry["files"])
    statement = f'spacemoe-shard-1\n["rig",{HIDDEN},"{STEM}",[{rows}]]'.encode()
    assert verified(keys[0], statement, base64.b64decode(made_of[STEM]))
    assert not verified(keys[0], statement, base64.b64decode(made_of["L01E003.int8"]))
    assert not verified(keys[0], statement.replace(b'"rig"', b'"rag"'), base64.b64decode(made_of[STEM]))


def test_the_command_signs_verifies_and_says_by_whom(bundle, keys, signer, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(bundle.root, root, ignore=lambda *_: ["manifest.sig", "shards.sig"])

    def run(*arguments) -> tuple[int, str]:
        code = cli.main(["bundle", *map(str, arguments)])
        out = capsys.readouterr()
        return code, out.out + out.err

    assert run("verify", root, "--signer", signer)[0] == 3
    code, text = run("sign", root, "--key", keys[0], "--json")
    assert (code, json.loads(text)) == (0, {"signer": signer, "shards": len(bundle.stems)})
    assert run("verify", root, "--signer", signer.upper())[0] == 0
    assert run("verify", root)[0] == 0
    assert json.loads(run("verify", root, "--signer", "ab" * 32, "--json")[1])["problems"]
    other = bundle_sign.signer_of(bundle_sign.load_key(keys[1]))
    assert run("verify", root, "--signer", other)[0] == 3
    assert json.loads(run("show", root, "--json")[1])["signer"] == signer
    # a change of the manifest makes its signature wrong, and those of shards stay
    tree = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(tree | {"licence": "MIT"}))
    code, text = run("verify", root, "--signer", signer, "--json")
    assert code == 3 and ["manifest.sig" in each for each in json.loads(text)["problems"]] == [True]
    assert "sign the bundle again" in json.loads(run("show", root, "--json")[1])["signature"]
    (root / f"experts/{STEM}.bin").write_bytes(b"x")
    code, text = run("sign", root, "--key", keys[0])
    assert code == 2 and f"{STEM}.bin" in text  # nobody signs what is altered


def test_a_key_that_others_may_read_or_that_is_none_is_refused(keys, tmp_path):
    assert openssl("genpkey", "-algorithm", "X25519", "-out", tmp_path / "agreement").returncode == 0
    shutil.copy(keys[0], tmp_path / "open")
    (tmp_path / "text").write_text("no key")
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, mode, said in (
        ("open", 0o640, "read or written by others"),
        ("agreement", 0o600, "no Ed25519"),
        ("text", 0o600, "PEM"),
        ("pipe", 0o600, "no plain file"),
    ):
        (tmp_path / name).chmod(mode)
        with pytest.raises(bundle_sign.SigningKeyError, match=said):
            bundle_sign.load_key(tmp_path / name)
    (tmp_path / "open").chmod(0o600)
    bundle_sign.load_key(tmp_path / "open")  # negative control


# ------------------------------------------------------------ what a node takes


def flipped(offer, keys, bundle):
    return dataclasses.replace(
        offer, signature=offer.signature[:9] + bytes([offer.signature[9] ^ 4]) + offer.signature[10:]
    )


def by_another(offer, keys, bundle):
    said = signature.shard_statement(offer.bundle, offer.hidden, offer.shard.stem, offer.files)
    return dataclasses.replace(offer, signature=bundle_sign.load_key(keys[1]).sign(said))


def of_another_shard(offer, keys, bundle):
    return dataclasses.replace(offer, signature=signed_offer(bundle, "L01E003.int8").signature)


def of_another_bundle(offer, keys, bundle):
    return dataclasses.replace(offer, bundle="rag")


def of_other_files(offer, keys, bundle):
    return dataclasses.replace(offer, files=(offer.files[0], dataclasses.replace(offer.files[1], sha256="ab" * 32)))


def unsigned(offer, keys, bundle):
    return dataclasses.replace(offer, signature=b"")


@pytest.mark.parametrize("wrong", [flipped, by_another, of_another_shard, of_another_bundle, of_other_files, unsigned])
def test_a_wrong_signature_is_refused_by_name_before_a_byte_is_stored(bundle, keys, signer, tmp_path, wrong):
    node, offer = trusting(tmp_path / "n", "ab" * 32, signer), signed_offer(bundle)
    (said,) = node.say(Message(OFFER, 1, offer=wrong(offer, keys, bundle)))
    assert (said.kind, said.refusal) == (REFUSED, "signature") and STEM in said.text
    assert node.counters.delivery_errors == {"signature": 1} and STEM in node.reported[0][1]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert send(node, bundle, offer)[-1].kind == DONE  # negative control
    # what another program has put on the disk meanwhile is checked at the next start
    frame_of = delivery_frame.pack(Message(OFFER, 0, offer=wrong(offer, keys, bundle)))
    good = (tmp_path / f"n/{STEM}.offer").read_bytes()
    for data, hosted in ((frame_of, 0), (good, 1)):
        (tmp_path / f"n/{STEM}.offer").write_bytes(data)
        again = trusting(tmp_path / "n", signer)
        again.receiver.restore()
        assert (len(again.experts.hosted), [kind for kind, _ in again.reported]) == (
            hosted,
            ["signature"] * (1 - hosted),
        )


def test_a_flashed_bundle_has_to_be_signed_as_it_is(bundle, signer, tmp_path):
    trust = signature.Trust((signer,))
    assert experts.load(bundle.root, (STEM,), 10**12, trust=trust).hosted
    root = tmp_path / "copy"
    shutil.copytree(bundle.root, root)
    tree = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(tree | {"licence": "MIT"}))
    assert experts.load(root, (STEM,), 10**12).hosted  # nobody asked
    with pytest.raises(ExpertError, match=f"{STEM} not loaded: .*manifest.sig is no signature"):
        experts.load(root, (STEM,), 10**12, trust=trust)
    (root / "manifest.sig").unlink()
    with pytest.raises(ExpertError, match=f"{STEM} not loaded: .*manifest.sig cannot be read"):
        experts.load(root, (STEM,), 10**12, trust=trust)
    os.mkfifo(root / "manifest.sig")
    with pytest.raises(ExpertError, match="no plain file"):
        experts.load(root, (STEM,), 10**12, trust=trust)


def test_beyond_this_machine_somebody_has_to_be_trusted_in_so_many_words(tmp_path):
    key = 'server_public_key = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"\nsecret_key_file = "k"\n'

    def parsed(bundle, endpoint="tcp://192.0.2.7:1", delivery="tcp://127.0.0.1:2"):
        data = f'[data]\nendpoint = "{endpoint}"\ndelivery_endpoint = "{delivery}"\n{key}'
        return config.parse(f'[node]\nid = "n"\nfleet = "f"\nstate_dir = "s"\n[bundle]\n{bundle}\n{data}', tmp_path)

    signers = f'signers = ["{"AB" * 32}"]'
    for endpoints in ({}, {"endpoint": "tcp://127.0.0.1:1", "delivery": "tcp://192.0.2.7:2"}):
        with pytest.raises(
            ConfigError, match=r"192.0.2.7:. is not this machine and \[bundle\] .*allow_unsigned = true"
        ):
            parsed("", **endpoints)
        assert parsed(signers, **endpoints).bundle.signers == ("ab" * 32,)
        parsed("allow_unsigned = true", **endpoints)
    parsed("", endpoint="tcp://127.0.0.1:1")
    for bad in (
        'signers = ["ab"]',
        "signers = 3",
        f"{signers}\nallow_unsigned = true",
        'signers = ["' + "x" * 64 + '"]',
    ):
        with pytest.raises(ConfigError, match="signers"):
            parsed(bad)


def test_damaged_lists_of_signatures_are_one_kind_of_error(bundle, tmp_path):
    good = json.loads((bundle.root / "shards.sig").read_text())
    for bad in (
        b"\xff",
        b"[]",
        json.dumps(good | {"format": "x"}).encode(),
        json.dumps(good | {"shards": {STEM: "AAAA"}}).encode(),
        json.dumps(good | {"shards": {STEM: 3}}).encode(),
        json.dumps(good | {"shards": [1]}).encode(),
        json.dumps(good | {"signer": "x"}).encode(),
        b"[" * 100_000,
    ):
        (tmp_path / "shards.sig").write_bytes(bad)
        with pytest.raises(signature.SignatureError, match="damaged"):
            signature.read_shard_signatures(tmp_path)


def test_a_real_agent_takes_what_is_signed_and_tells_of_what_is_not(bundle, keys, signer, tmp_path):
    """A copy that was signed with another key, over real sockets; the event comes over a real broker."""
    other = tmp_path / "other"
    shutil.copytree(bundle.root, other)
    bundle_sign.sign(other, bundle_sign.load_key(keys[1]))
    with Broker(tmp_path, "embedded") as broker, Observer(broker.host, broker.port) as seen:
        tables = {"bundle": {"signers": [signer]}}
        with Rig(tmp_path, bundle, broker=broker, extra=tables) as rig:
            assert rig.deliver(STEM).sent_bytes > 0
            assert np.array_equal(rig.served(1, [(0, 2, 1, 1.0)]).x, local(bundle, 1, [(0, 2, 1, 1.0)]))
            rig.bundle = dataclasses.replace(bundle, root=other)
            with pytest.raises(DeliveryRefused, match="n1 refuses .signature.: L01E003.int8 of 'rig' has a wrong"):
                rig.deliver("L01E003.int8")
            (other / "shards.sig").unlink()
            with pytest.raises(DeliveryRefused, match="signature.: L01E001.int8 is not signed"):
                rig.deliver("L01E001.int8")
            event = seen.next("event", lambda tree: tree["kind"] == "delivery")
            assert "signature" in event["text"] and "L01E003.int8" in event["text"]


# ------------------------------------------------------------ newer shards


def test_a_newer_shard_takes_over_while_requests_are_served_also_after_a_kill_9(bundle, newer, tmp_path):
    """Killed in the middle of the transfer the board comes back with the old shard, and the rest is sent. Every answer is that of the
    old one or of the new one, and of the new one from the first on."""
    stem, pairs = "L01E002.fp32", [(0, 2, 0, 0.7), (1, 2, 0, 0.3)]
    old, new = local(bundle, 1, pairs, 2), local(newer, 1, pairs, 2)
    assert not np.array_equal(old, new)
    with Rig(tmp_path, bundle) as rig:
        rig.deliver(stem)
        rig.bundle, rig.manifest = newer, shard.read_manifest(newer.root)
        with pytest.raises(Stop):
            rig.deliver(stem, windows=slow(), progress=stop_beyond(0.5))
        rig.agent.kill()
        rig.agent.restart()
        answer, _ = rig.ground.ask_until_answered(request(1, pairs, 2))
        assert np.array_equal(answer.x, old)
        answers = []

        def ask(*_):
            answers.extend(rig.served(1, pairs, 2) for _ in range(3))

        ask()
        got = rig.deliver(stem, progress=ask)
        ask()
        assert got.had_bytes > 0.5 * got.total_bytes and got.had_bytes + got.sent_bytes == got.total_bytes
        assert len(answers) > 6 and all(answer.kind == frame.PARTIAL for answer in answers)
        which = [int(not np.array_equal(answer.x, old)) for answer in answers]
        assert which == sorted(which) and {0, 1} == set(which)
        assert all(np.array_equal(answer.x, new) for answer, kind in zip(answers, which) if kind)
        names = sorted(path.name for path in (tmp_path / "state/shards").rglob("*") if path.is_file())
        assert names == [f"{stem}.bin", f"{stem}.offer", f"{stem}.onnx"]


def test_a_newer_shard_in_place_of_one_of_the_node_s_own_bundle_stays_after_a_restart(bundle, newer, tmp_path):
    def start() -> Node:
        node = Node(tmp_path / "state", bundle.root)
        for name in (STEM, "L00E000.int8"):
            entry = shard.read_manifest(bundle.root).shard(int(name[1:3]), int(name[4:7]), name[8:])
            node.experts.adopt(HIDDEN, "rig")
            node.experts.add(entry, bundle.root / entry.files[0].path)
        node.receiver.restore()
        return node

    offer = signed_offer(newer)
    assert send(start(), newer, offer)[-1].kind == DONE
    again = start()
    hosted = {item.expert: item.sha256 for item in again.experts.hosted}
    assert hosted[2] == shard.read_manifest(newer.root).shard(1, 2, "int8").sha256 and len(hosted) == 2
    assert not again.reported


CALLS = ("replace", "unlink", "fsync", "open")


def killed_at(count: int, root, bundle, offer) -> bool:
    """Delivers in a process of its own that ends by SIGKILL at its count-th call of the disk; False: it came to its end."""
    pid = os.fork()
    if pid == 0:
        left = [count]
        try:
            node = Node(root)
            node.receiver.restore()

            def counted(real):
                def call(*arguments, **options):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments, **options)

                return call

            for name in CALLS:
                setattr(os, name, counted(getattr(os, name)))
            ended = send(node, bundle, offer)[-1].kind == DONE
        finally:
            os._exit(0 if ended else 1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_any_call_of_the_disk_the_old_or_the_new_shard_is_whole(bundle, newer, tmp_path):
    """From the offer to the last deletion; before the .offer is in place it is the old one, from then on the new one."""
    old, new = signed_offer(bundle), signed_offer(newer)
    x = np.random.default_rng(0).standard_normal((1, HIDDEN)).astype(np.float32)
    pairs = np.array([(0, 2, 1, 1.0)], frame.PAIR)
    want = [experts.load(each.root, (STEM,), 10**12).run(1, x, pairs) for each in (bundle, newer)]
    assert send(Node(tmp_path / "base"), bundle, old)[-1].kind == DONE
    seen, count = [], 0
    while True:
        root = tmp_path / str(count)
        shutil.copytree(tmp_path / "base", root)
        was_killed = killed_at(count, root, newer, new)
        node = Node(root)
        node.receiver.restore()
        assert not node.reported
        got = node.experts.run(1, x, pairs)
        assert any(np.array_equal(got, each) for each in want)
        seen.append(int(np.array_equal(got, want[1])))
        assert send(node, newer, new)[-1].kind == DONE
        assert np.array_equal(node.experts.run(1, x, pairs), want[1])
        names = sorted(path.name for path in root.rglob("*") if path.is_file() and path.suffix != ".partial")
        assert names == [f"{STEM}.bin", f"{STEM}.offer", f"{STEM}.onnx"]  # nothing of the old one is left
        if not was_killed:
            break
        shutil.rmtree(root)
        count += 1
    assert seen == sorted(seen) and {0, 1} == set(seen) and count > 15
    assert delivery_store.Store(tmp_path / str(count)).graph(new.files)
