{
    ((1, 2048), 0, "inductor_standalone"): {
        "cache_key": "aas5vodo7tb5q6dzrxchsnd2yxxbbzecn7lqd6ao46krlclgdnqn",
        "graph_handle": (
            "artifact_compile_range_1_2048_subgraph_0",
            "/app/cache/torch_compile_cache/41cd54a20c/rank_0_0/backbone/artifact_compile_range_1_2048_subgraph_0",
        ),
    },
    ((1, 2048), 1, "inductor_standalone"): {
        "cache_key": "ag7i5wsodjrzwnlmyjoyjvdhoidoqqgzqs7uijlvywzbce7mtpct",
        "graph_handle": (
            "artifact_compile_range_1_2048_subgraph_1",
            "/app/cache/torch_compile_cache/41cd54a20c/rank_0_0/backbone/artifact_compile_range_1_2048_subgraph_1",
        ),
    },
    ((1, 2048), 2, "inductor_standalone"): {
        "cache_key": "afar6j3a6l5ffzlilgzlytbscaennm3lbhskrkygraavtjjvga2f",
        "graph_handle": (
            "artifact_compile_range_1_2048_subgraph_2",
            "/app/cache/torch_compile_cache/41cd54a20c/rank_0_0/backbone/artifact_compile_range_1_2048_subgraph_2",
        ),
    },
    ((1, 2048), 3, "inductor_standalone"): {
        "cache_key": "am6j5xmofdrj3ymx2mqxekldyvrvf5dxlczuya2glqxxvazjhxc6",
        "graph_handle": (
            "artifact_compile_range_1_2048_subgraph_3",
            "/app/cache/torch_compile_cache/41cd54a20c/rank_0_0/backbone/artifact_compile_range_1_2048_subgraph_3",
        ),
    },
}
