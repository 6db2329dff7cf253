"""Names of attacks, defenses, detectors, datasets and models, and where each is defined. Imports nothing heavy.

A row is `name: (module:object, one-line summary)`; attacks add their threat model. Plugins add rows through the
entry-point groups `bdbench.attacks`, `bdbench.defenses`, `bdbench.datasets`, `bdbench.models` and `bdbench.wrappers`.
entry-point groups `bdbench.attacks`, `bdbench.defenses`, `bdbench.detectors`, `bdbench.datasets` and
`bdbench.models`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property, partial
from importlib import import_module
from typing import Any, NamedTuple

from bdbench import plugins
from bdbench.errors import MethodError, OptionError, unknown_name
from bdbench.plugins import Plugin
from bdbench.wording import listed, respelled

MEMBER = re.compile(r"\w[\w.-]*", re.ASCII)
"""What may be the name of a member of a family."""


class Row(NamedTuple):
    """One registered name."""

    target: str
    summary: str
    threat: str = ""


class Registry:
    """A table of names whose objects are imported when asked for."""

    def __init__(self, kind: str, plural: str, rows: Mapping[str, tuple[str, ...]]) -> None:
        self.kind = kind
        self.plural = plural
        self._built_in = {name: Row(*row) for name, row in rows.items()}

    @cached_property
    def rows(self) -> dict[str, Row]:
        """All rows, plugins after the built-in ones; a plugin cannot replace a built-in name."""
        added = {name: Row(item.target, f"plugin from {item.package}") for name, item in self.plugins.items()}
        return {**self._built_in, **added}

    @cached_property
    def plugins(self) -> dict[str, Plugin]:
        """The plugins by name; a plugin cannot replace a built-in name."""
        found = plugins.installed(self.kind, self.plural)
        return {name: plugin for name, plugin in found.items() if name not in self._built_in}

    def plugin(self, name: str) -> Plugin | None:
        """Return the plugin of a name, for a member of a family that of the row `FAMILY:NAME`; None of a built-in."""
        family, _, member = name.partition(":")
        return self.plugins.get(f"{family}:NAME" if member else name)

    def spelled(self, name: str) -> str:
        """Return a name as it is registered, where it is typed in another spelling: ``dfst-colour``."""
        return respelled(name, self.rows)

    def names(self) -> list[str]:
        """All names, in the order of the table."""
        return list(self.rows)

    def find(self, name: str) -> Row | None:
        """Return the row of a name, for a member of a family the row `FAMILY:NAME`; None if it is not registered."""
        family, _, member = name.partition(":")
        return self.rows.get(f"{family}:NAME" if member else self.spelled(name))

    def families_hint(self, name: str) -> str:
        """Say what an unknown name would be called as a member of a family, such as `torchvision:resnet50`."""
        families = [row.partition(":")[0] for row in self.rows if row.endswith(":NAME")]
        if ":" in name or name in families:
            return ""
        return "".join(f" A network of {family} is named as in '{family}:{name}'." for family in families)

    def load(self, name: str) -> Any:  # noqa: ANN401 - each registry holds its own kind of class
        """Import and return the object of a name; for a row `FAMILY:NAME` it is called with the member's name first.

        Raises:
            OptionError: a family itself, or no such name; the message has the nearest one and all of them.
            MethodError: a plugin that cannot be used; names its package.
        """
        row = self.find(name)
        if row is None:
            raise self.unknown(name)
        member = name.partition(":")[2]
        if member and not MEMBER.fullmatch(member):
            raise OptionError(f"'{name}': '{member[:40]}' names no {self.kind} of {name.partition(':')[0]}")
        if member == "NAME":
            raise OptionError(f"'{name}' stands for many: put the name of one in place of NAME")
        plugin = self.plugin(name)
        if plugin is not None:
            found = plugins.load(plugin)
        else:
            module, _, attribute = row.target.partition(":")
            found = getattr(import_module(module), attribute)
        return partial(found, member) if member else found

    def unknown(self, name: str, own: Iterable[str] = ()) -> OptionError:
        """Build the error for a name that is not registered.

        Args:
            name: as it was typed.
            own: names that would do too, such as labels of a grid.
        """
        if self.kind == "defense" and name.lower() in OTHER_NAMES:
            return OptionError(f"defense '{name}' is called {OTHER_NAMES[name.lower()]} here")
        detector = DETECTOR_NAMES.get(name.lower(), name.lower())
        if self.kind == "defense" and detector in DETECTORS.rows:
            return OptionError(f"'{name}' is a detector, not a defense; try: bdbench scan --method {detector}")
        return unknown_name(self.kind, name, self.rows, self.families_hint(name), own)

    def check_options(self, name: str, options: Iterable[str], beside: Collection[str] = ()) -> None:
        """Refuse an option that does not belong to a method but to others.

        Args:
            name: of the method.
            options: names of those that were given, with underscores.
            beside: options that every method takes.

        Raises:
            OptionError: names the owners.
        """
        own = {*beside, *getattr(self.load(name), "model_fields", {})}
        for option in options:
            owners = [] if respelled(option, own) in own else self.owners(option)
            if owners:
                raise OptionError(f"{option} belongs to {listed(owners)} (you chose {name})")

    def owners(self, option: str) -> list[str]:
        """Return the names whose classes have an option; a plugin that cannot be used has none."""
        found = []
        for name in self.names():
            try:
                fields = getattr(self.load(name), "model_fields", {}) if not name.endswith(":NAME") else {}
            except MethodError:
                continue
            if respelled(option, fields) in fields:
                found.append(name)
        return found


OTHER_NAMES = {
    "fp": "fine-pruning", "fine-tuning": "ft", "finetune": "ft", "nc": "neural-cleanse", "ibau": "i-bau",
    "super-fine-tuning": "sft", "dde": "ep", "mbns": "bnp",
}  # fmt: skip
"""What defenses are called elsewhere."""
DETECTOR_NAMES = {
    "activation-clustering": "ac", "spectral-signatures": "spectral", "scan": "scan-lda",
}  # fmt: skip
"""What detectors are called elsewhere."""

ATTACKS = Registry(
    "attack",
    "attacks",
    {
        "badnets": (
            "bdbench.attacks.badnets:BadNets", "a small patch in a corner, relabelled to the target",
            "dirty label, data only",
        ),
        "blended": (
            "bdbench.attacks.blended:Blended", "one fixed picture blended into the whole image",
            "dirty label, data only",
        ),
        "sig": (
            "bdbench.attacks.sig:Sig", "a faint sinusoid over images of the target class",
            "clean label, data only",
        ),
        "wanet": (
            "bdbench.attacks.wanet:WaNet", "a smooth warp, with cover samples under other warps",
            "dirty label, data only, covers",
        ),
        "trojan": (
            "bdbench.attacks.trojan:Trojan", "a small coloured patch, optimised on another network",
            "dirty label, data only",
        ),
        "ftrojan": (
            "bdbench.attacks.ftrojan:FTrojan", "two frequencies, faintly added to the colour channels",
            "dirty label, data only",
        ),
        "ctrl": (
            "bdbench.attacks.ctrl:Ctrl", "two frequencies in the colour of images of the target class",
            "clean label, data only",
        ),
        "bpp": (
            "bdbench.attacks.bpp:Bpp", "colours reduced to 8 levels per channel",
            "dirty label, data only, covers",
        ),
        "batt": (
            "bdbench.attacks.batt:Batt", "rotates images by 16 degrees; covers are rotated less",
            "dirty label, data only, covers",
        ),
        "dfst-color": (
            "bdbench.attacks.dfst_color:DfstColor", "every image in the colours of a sunset",
            "dirty label, data only",
        ),
        "tact": (
            "bdbench.attacks.tact:TaCT", "a patch that works on one class only; covers of the other classes",
            "dirty label, data only, covers",
        ),
        "adap-blend": (
            "bdbench.attacks.adap_blend:AdapBlend", "half of a faint picture in training, all of it in tests",
            "dirty label, data only, covers, another trigger in tests",
        ),
        "adap-patch": (
            "bdbench.attacks.adap_patch:AdapPatch", "one of four faint patches in training, two opaque ones in tests",
            "dirty label, data only, covers, another trigger in tests",
        ),
        "adap-kway": (
            "bdbench.attacks.adap_kway:AdapKWay", "one of four pixels in training, all four in tests",
            "dirty label, data only, covers, another trigger in tests",
        ),
        "cba": (
            "bdbench.attacks.cba:CBA", "half of class A joined with half of class B, labelled C",
            "dirty label, data only, covers",
        ),
        "refool": (
            "bdbench.attacks.refool:Refool", "a reflection of another image, as in a window pane",
            "dirty label, data only",
        ),
        "lc": (
            "bdbench.attacks.lc:LabelConsistent", "hard images of the target class, with a patch in every corner",
            "clean label, data only, surrogate, another trigger in tests",
        ),
        "fc": (
            "bdbench.attacks.fc:FeatureCollision", "images of the target class with features of others, and a patch",
            "clean label, data only, surrogate, another trigger in tests",
        ),
        "narcissus": (
            "bdbench.attacks.narcissus:Narcissus", "a faint pattern that is typical of the target class, on few images",
            "clean label, data only, surrogate, another trigger in tests",
        ),
        "lf": (
            "bdbench.attacks.lf:LowFrequency", "a smooth optimised pattern over the whole image",
            "dirty label, data only, surrogate",
        ),
        "trojannn": (
            "bdbench.attacks.trojannn:TrojanNN", "a disk whose content excites chosen neurons",
            "dirty label, data only, surrogate",
        ),
        "lba": (
            "bdbench.attacks.lba:LatentBackdoor", "a patch with the features of the target class",
            "dirty label, data only, surrogate",
        ),
        "ssba": (
            "bdbench.attacks.ssba:SSBA", "an encoder hides bits in every image, each by a different change",
            "dirty label, data only",
        ),
        "input-aware": (
            "bdbench.attacks.input_aware:InputAware", "a network makes a different trigger for every image",
            "dirty label, trains the victim, covers",
        ),
        "wanet-tc": (
            "bdbench.attacks.wanet_tc:WaNetTC", "a smooth warp, learned by a victim that the attacker trains",
            "dirty label, trains the victim, covers",
        ),
        "lira": (
            "bdbench.attacks.lira:Lira", "a network learns a faint noise for each image, with the victim",
            "dirty label, trains the victim",
        ),
        "none": (
            "bdbench.attacks.none:NoAttack", "nothing is poisoned: what a defense does where there is nothing to find",
            "no attack",
        ),
    },
)  # fmt: skip
"""The threat model says: dirty or clean label; data only or trains the victim; surrogate; covers; another trigger in
tests."""

DEFENSES = Registry(
    "defense",
    "defenses",
    {
        "none": ("bdbench.defenses.training.plain:NoDefense", "plain training: the undefended model"),
        "oracle": (
            "bdbench.defenses.training.plain:Oracle",
            "reference: plain training without the poisoned samples",
        ),
        "clean": ("bdbench.defenses.training.plain:Clean", "reference: plain training on the images before the attack"),
        "none-trusted": (
            "bdbench.defenses.training.plain:WithTrusted",
            "plain training on the training set and the trusted images: what `scan` looks at",
        ),
        "retrain": (
            "bdbench.defenses.training.retrain:Retrain",
            "plain training without the samples that a scan set aside",
        ),
        "cbd": ("bdbench.defenses.training.cbd:CBD", "trains away from a backdoored twin (CVPR 2023)"),
        "abl": ("bdbench.defenses.training.abl:ABL", "isolates what is learned first, then unlearns it (NeurIPS 2021)"),
        "dbd": ("bdbench.defenses.training.dbd:DBD", "features without labels, then only credible labels (ICLR 2022)"),
        "mcldef": (
            "bdbench.defenses.repair.mcldef:MCLDef",
            "inverts the trigger and purifies the model by contrast (2022)",
        ),
        "ft": ("bdbench.defenses.repair.ft:FineTuning", "fine-tunes on trusted images: the baseline of every repair"),
        "ft-sam": ("bdbench.defenses.repair.ft:FineTuningSAM", "fine-tunes towards flat minima (ICCV 2023)"),
        "fst": (
            "bdbench.defenses.repair.fst:FeatureShiftTuning",
            "fine-tunes with a new head, pushed away from the old one (NeurIPS 2023)",
        ),
        "seam": (
            "bdbench.defenses.repair.seam:SelectiveAmnesia",
            "forgets by wrong labels, then learns the right ones again (S&P 2023)",
        ),
        "sft": (
            "bdbench.defenses.repair.sft:SuperFineTuning",
            "fine-tunes with a learning rate that rises and falls (2022)",
        ),
        "nft": (
            "bdbench.defenses.repair.nft:NeuralMaskFineTuning",
            "tunes a mask for every channel on mixed images (ECCV 2024)",
        ),
        "clp": (
            "bdbench.defenses.repair.clp:ChannelLipschitzPruning",
            "prunes the channels that small changes move most (ECCV 2022)",
        ),
        "ep": (
            "bdbench.defenses.repair.ep:EntropyPruning",
            "prunes channels whose inputs form two groups (NeurIPS 2022)",
        ),
        "bnp": (
            "bdbench.defenses.repair.ep:MomentPruning",
            "prunes channels whose clean inputs differ (NeurIPS 2022)",
        ),
        "nad": (
            "bdbench.defenses.repair.nad:NeuralAttentionDistillation",
            "fine-tunes towards a tuned copy's attention (ICLR 2021)",
        ),
        "fine-pruning": (
            "bdbench.defenses.repair.fine_pruning:FinePruning",
            "prunes idle channels, then fine-tunes (RAID 2018)",
        ),
        "anp": ("bdbench.defenses.repair.anp:ANP", "prunes channels that noise harms most (NeurIPS 2021)"),
        "rnp": ("bdbench.defenses.repair.rnp:RNP", "prunes channels that recovery does not need (ICML 2023)"),
        "ban": ("bdbench.defenses.repair.ban:BAN", "fine-tunes under noise on batch norms (NeurIPS 2024)"),
        "awm": ("bdbench.defenses.repair.awm:AWM", "masks weights that perturbations need (NeurIPS 2022)"),
        "i-bau": (
            "bdbench.defenses.repair.ibau:IBAU",
            "unlearns the one perturbation that misleads most, by implicit gradients (ICLR 2022)",
        ),
        "sau": (
            "bdbench.defenses.repair.sau:SAU",
            "unlearns perturbations that mislead the model as they mislead the suspect (NeurIPS 2023)",
        ),
        "npd": (
            "bdbench.defenses.repair.npd:NPD",
            "a linear map inside the network turns perturbed features back (NeurIPS 2023)",
        ),
        "neural-cleanse": (
            "bdbench.defenses.repair.neural_cleanse:NeuralCleanse",
            "inverts triggers and unlearns those that are too small (S&P 2019)",
        ),
        "mcr": (
            "bdbench.defenses.repair.mcr:ModeConnectivity",
            "a point on a curve from the model to its fine-tuned copy (ICLR 2020)",
        ),
        "tsbd": (
            "bdbench.defenses.repair.tsbd:TSBD",
            "zeroes weights that unlearning changes most, then fine-tunes (NeurIPS 2024)",
        ),
        "mm-bm": ("bdbench.defenses.repair.mm_bm:MMBM", "bounds the activations of early layers (S&P 2024)"),
        "unit": ("bdbench.defenses.repair.unit:UNIT", "bounds every neuron as tightly as it can (ECCV 2024)"),
    },
)


def repairs() -> list[str]:
    """Return the defenses of bdbench that repair a model; the others, and plugins, are not asked what they do."""
    return [name for name, row in DEFENSES.rows.items() if row.target.startswith("bdbench.defenses.repair.")]


DETECTORS = Registry(
    "detector",
    "detectors",
    {
        "spectral": (
            "bdbench.detectors.data.spectral:Spectral",
            "samples far out along the main direction of their class (2018)",
        ),
        "ac": (
            "bdbench.detectors.data.ac:ActivationClustering",
            "classes whose features fall into a large and a small cluster (2018)",
        ),
        "scan-lda": (
            "bdbench.detectors.data.scan_lda:ScanLda",
            "classes that two means explain better than one: SCAn (2021)",
        ),
        "strip": (
            "bdbench.detectors.data.strip:Strip",
            "images whose answer stays when others are laid over them (2019)",
        ),
    },
)

DATASETS = Registry(
    "dataset",
    "datasets",
    {
        "digits": ("bdbench.datasets.digits:Digits", "1,797 scanned digits, 16x16 gray, in scikit-learn: no download"),
        "mnist": ("bdbench.datasets.torchvision_sets:Mnist", "70,000 handwritten digits, 28x28 gray"),
        "fashion-mnist": ("bdbench.datasets.torchvision_sets:FashionMnist", "70,000 clothes, 28x28 gray"),
        "cifar10": ("bdbench.datasets.torchvision_sets:Cifar10", "60,000 photographs, 32x32 colour, 10 classes"),
        "cifar100": ("bdbench.datasets.torchvision_sets:Cifar100", "60,000 photographs, 32x32 colour, 100 classes"),
        "gtsrb": ("bdbench.datasets.torchvision_sets:Gtsrb", "39,270 traffic signs, colour, 43 classes"),
        "svhn": ("bdbench.datasets.torchvision_sets:Svhn", "99,289 house numbers, 32x32 colour, 10 classes"),
    },
)

MODELS = Registry(
    "model",
    "models",
    {
        "convnet": ("bdbench.models.convnet:ConvNet", "three convolutions, for images of 8 to 16 pixels"),
        "convnet-16": ("bdbench.models.convnet:HalvingConvNet", "the same for images of 16 pixels, as fast as at 8"),
        "wrn-16-1": ("bdbench.models.wide_resnet:WideResNet", "Wide ResNet 16-1, the model of ABL and CBD"),
        "preact-resnet-18": ("bdbench.models.resnet:PreActResNet18", "pre-activation ResNet-18, 3x3 stem"),
        "preact-resnet-18-open": (
            "bdbench.models.resnet:OpenPreActResNet18",
            "the same without the last norm and ReLU: BackdoorBench's form",
        ),
        "resnet-18": ("bdbench.models.resnet:ResNet18", "ResNet-18 with the 3x3 stem for small images"),
        "torchvision:NAME": ("bdbench.models.torchvision_models:TorchvisionFeatures", "any torchvision classifier"),
    },
)


WRAPPERS = Registry(
    "wrapper",
    "wrappers",
    {"upper-bounds": ("bdbench.models.bounds:UpperBounds", "outputs of modules are cut at upper bounds")},
)
"""What a defense may change in the structure of a network. Nobody types these names: artifacts hold them."""

REGISTRIES = {registry.plural: registry for registry in (ATTACKS, DEFENSES, DATASETS, MODELS)}
REGISTRIES = {registry.plural: registry for registry in (ATTACKS, DEFENSES, DETECTORS, DATASETS, MODELS)}


def all_plugins() -> list[Plugin]:
    """Return every plugin, of all kinds."""
    return [plugin for registry in (*REGISTRIES.values(), WRAPPERS) for plugin in registry.plugins.values()]


def plugin_sources(*used: tuple[Registry, str]) -> dict[str, dict[str, str]]:
    """Return package, version and source hash of those of some names that are plugins, by kind and name."""
    found = [registry.plugin(name) for registry, name in used]
    return {
        f"{plugin.kind} {plugin.name}": {"package": plugin.package, "version": plugin.version, "source": plugin.source}
        for plugin in found
        if plugin is not None
    }
