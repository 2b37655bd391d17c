{
  "target_defaults": {
    "cflags": ["-Wall", "-Wextra", "-Werror", "-O2"],
    "cflags!": ["-Wno-unused-parameter"],
    "defines": ["_GNU_SOURCE", "_FILE_OFFSET_BITS=64"]
  },
  "targets": [
    {
      # The Node-API addon: only what JavaScript cannot do.
      "target_name": "loopguest_native",
      "sources": [
        "addon.c", "memory.c", "ring.c", "epoll.c", "operation.c", "pool.c", "lguest.c", "kvm.c", "sleep.c", "files.c",
        "packets.c", "terminal.c"
      ],
      "defines": ["NAPI_VERSION=8"]
    },
    {
      # The first process of the default guest; static, because the guest's root may hold no libc of ours.
      "target_name": "guest-init",
      "type": "executable",
      "sources": ["guest-init.c", "guest-net.c"],
      "ldflags": ["-static"]
    },
    {
      # The little parent of a UML guest that ends it when the launcher is gone.
      "target_name": "uml-keeper",
      "type": "executable",
      "sources": ["uml-keeper.c"],
      "ldflags": ["-static"]
    },
    {
      # Preloaded into UML: CPUs with more registers than it knows.
      "target_name": "uml-registers",
      "type": "shared_library",
      "product_prefix": "",
      "sources": ["uml-registers.c"]
    },
    {
      # Preloaded into virtiofsd: files that are not its user's own.
      "target_name": "virtiofsd-open",
      "type": "shared_library",
      "product_prefix": "",
      "sources": ["virtiofsd-open.c"]
    }
  ]
}
