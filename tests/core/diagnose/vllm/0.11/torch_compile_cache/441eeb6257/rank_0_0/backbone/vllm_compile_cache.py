{   (None, 0, 'inductor_standalone'): (   'artifact_shape_None_subgraph_0',
                                          '/app/cache/torch_compile_cache/441eeb6257/rank_0_0/backbone/artifact_shape_None_subgraph_0'),
    (None, 1, 'inductor_standalone'): (   'artifact_shape_None_subgraph_1',
                                          '/app/cache/torch_compile_cache/441eeb6257/rank_0_0/backbone/artifact_shape_None_subgraph_1'),
    (None, 2, 'inductor_standalone'): (   'artifact_shape_None_subgraph_2',
                                          '/app/cache/torch_compile_cache/441eeb6257/rank_0_0/backbone/artifact_shape_None_subgraph_2'),
    (None, 3, 'inductor_standalone'): (   'artifact_shape_None_subgraph_3',
                                          '/app/cache/torch_compile_cache/441eeb6257/rank_0_0/backbone/artifact_shape_None_subgraph_3')}