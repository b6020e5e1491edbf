from __future__ import annotations
import torch
class GraphModule(torch.nn.Module):
    def forward(self, L_self_modules_layers_modules_0_modules_proj_parameters_weight_: "f32[16, 16]", L_self_modules_layers_modules_0_modules_proj_parameters_bias_: "f32[16]", s77: "Sym(s77)", L_x_: "f32[s77, 16]", L_self_modules_layers_modules_0_modules_norm_parameters_weight_: "f32[16]", L_self_modules_layers_modules_0_modules_norm_parameters_bias_: "f32[16]", L_self_modules_layers_modules_1_modules_proj_parameters_weight_: "f32[16, 16]", L_self_modules_layers_modules_1_modules_proj_parameters_bias_: "f32[16]", L_self_modules_layers_modules_1_modules_norm_parameters_weight_: "f32[16]", L_self_modules_layers_modules_1_modules_norm_parameters_bias_: "f32[16]", L_self_modules_layers_modules_2_modules_proj_parameters_weight_: "f32[16, 16]", L_self_modules_layers_modules_2_modules_proj_parameters_bias_: "f32[16]", L_self_modules_layers_modules_2_modules_norm_parameters_weight_: "f32[16]", L_self_modules_layers_modules_2_modules_norm_parameters_bias_: "f32[16]"):
        l_self_modules_layers_modules_0_modules_proj_parameters_weight_ = L_self_modules_layers_modules_0_modules_proj_parameters_weight_
        l_self_modules_layers_modules_0_modules_proj_parameters_bias_ = L_self_modules_layers_modules_0_modules_proj_parameters_bias_
        l_x_ = L_x_
        l_self_modules_layers_modules_0_modules_norm_parameters_weight_ = L_self_modules_layers_modules_0_modules_norm_parameters_weight_
        l_self_modules_layers_modules_0_modules_norm_parameters_bias_ = L_self_modules_layers_modules_0_modules_norm_parameters_bias_
        l_self_modules_layers_modules_1_modules_proj_parameters_weight_ = L_self_modules_layers_modules_1_modules_proj_parameters_weight_
        l_self_modules_layers_modules_1_modules_proj_parameters_bias_ = L_self_modules_layers_modules_1_modules_proj_parameters_bias_
        l_self_modules_layers_modules_1_modules_norm_parameters_weight_ = L_self_modules_layers_modules_1_modules_norm_parameters_weight_
        l_self_modules_layers_modules_1_modules_norm_parameters_bias_ = L_self_modules_layers_modules_1_modules_norm_parameters_bias_
        l_self_modules_layers_modules_2_modules_proj_parameters_weight_ = L_self_modules_layers_modules_2_modules_proj_parameters_weight_
        l_self_modules_layers_modules_2_modules_proj_parameters_bias_ = L_self_modules_layers_modules_2_modules_proj_parameters_bias_
        l_self_modules_layers_modules_2_modules_norm_parameters_weight_ = L_self_modules_layers_modules_2_modules_norm_parameters_weight_
        l_self_modules_layers_modules_2_modules_norm_parameters_bias_ = L_self_modules_layers_modules_2_modules_norm_parameters_bias_

        # No stacktrace found for following nodes
        submod_0 = self.submod_0(l_x_, s77, l_self_modules_layers_modules_0_modules_proj_parameters_weight_, l_self_modules_layers_modules_0_modules_proj_parameters_bias_);  l_self_modules_layers_modules_0_modules_proj_parameters_weight_ = l_self_modules_layers_modules_0_modules_proj_parameters_bias_ = None
        getitem = submod_0[0]
        getitem_1 = submod_0[1];  submod_0 = None
        submod_1 = self.submod_1(getitem, s77, getitem_1);  getitem = submod_1 = None
        submod_2 = self.submod_2(getitem_1, s77, l_self_modules_layers_modules_0_modules_norm_parameters_weight_, l_self_modules_layers_modules_0_modules_norm_parameters_bias_, l_x_, l_self_modules_layers_modules_1_modules_proj_parameters_weight_, l_self_modules_layers_modules_1_modules_proj_parameters_bias_);  getitem_1 = l_self_modules_layers_modules_0_modules_norm_parameters_weight_ = l_self_modules_layers_modules_0_modules_norm_parameters_bias_ = l_x_ = l_self_modules_layers_modules_1_modules_proj_parameters_weight_ = l_self_modules_layers_modules_1_modules_proj_parameters_bias_ = None
        getitem_2 = submod_2[0]
        getitem_3 = submod_2[1]
        getitem_4 = submod_2[2];  submod_2 = None
        submod_3 = self.submod_3(getitem_2, s77, getitem_3);  getitem_2 = submod_3 = None
        submod_4 = self.submod_4(getitem_3, s77, l_self_modules_layers_modules_1_modules_norm_parameters_weight_, l_self_modules_layers_modules_1_modules_norm_parameters_bias_, getitem_4, l_self_modules_layers_modules_2_modules_proj_parameters_weight_, l_self_modules_layers_modules_2_modules_proj_parameters_bias_);  getitem_3 = l_self_modules_layers_modules_1_modules_norm_parameters_weight_ = l_self_modules_layers_modules_1_modules_norm_parameters_bias_ = getitem_4 = l_self_modules_layers_modules_2_modules_proj_parameters_weight_ = l_self_modules_layers_modules_2_modules_proj_parameters_bias_ = None
        getitem_5 = submod_4[0]
        getitem_6 = submod_4[1]
        getitem_7 = submod_4[2];  submod_4 = None
        submod_5 = self.submod_5(getitem_5, s77, getitem_6);  getitem_5 = submod_5 = None
        submod_6 = self.submod_6(getitem_6, s77, l_self_modules_layers_modules_2_modules_norm_parameters_weight_, l_self_modules_layers_modules_2_modules_norm_parameters_bias_, getitem_7);  getitem_6 = s77 = l_self_modules_layers_modules_2_modules_norm_parameters_weight_ = l_self_modules_layers_modules_2_modules_norm_parameters_bias_ = getitem_7 = None
        getitem_8 = submod_6[0];  submod_6 = None
        return (getitem_8,)

    class submod_0(torch.nn.Module):
        def forward(self, l_x_: "f32[s77, 16]", s77: "Sym(s77)", l_self_modules_layers_modules_0_modules_proj_parameters_weight_: "f32[16, 16]", l_self_modules_layers_modules_0_modules_proj_parameters_bias_: "f32[16]"):
            # File: /app/model.py:51 in forward, code: q = self.proj(x)
            linear: "f32[s77, 16]" = torch._C._nn.linear(l_x_, l_self_modules_layers_modules_0_modules_proj_parameters_weight_, l_self_modules_layers_modules_0_modules_proj_parameters_bias_);  l_x_ = l_self_modules_layers_modules_0_modules_proj_parameters_weight_ = l_self_modules_layers_modules_0_modules_proj_parameters_bias_ = None

            # File: /app/model.py:52 in forward, code: out = torch.empty_like(q)
            empty_like: "f32[s77, 16]" = torch.empty_like(linear)
            return (linear, empty_like)

    class submod_1(torch.nn.Module):
        def forward(self, q: "f32[s77, 16]", s77: "Sym(s77)", out: "f32[s77, 16]"):
            # File: /app/model.py:53 in forward, code: torch.ops.toy.attention(q, out, self.name)
            attention = torch.ops.toy.attention(q, out, 'model.layers.0.self_attn.attn');  q = out = attention = None
            return ()

    class submod_2(torch.nn.Module):
        def forward(self, out: "f32[s77, 16]", s77: "Sym(s77)", l_self_modules_layers_modules_0_modules_norm_parameters_weight_: "f32[16]", l_self_modules_layers_modules_0_modules_norm_parameters_bias_: "f32[16]", l_x_: "f32[s77, 16]", l_self_modules_layers_modules_1_modules_proj_parameters_weight_: "f32[16, 16]", l_self_modules_layers_modules_1_modules_proj_parameters_bias_: "f32[16]"):
            # File: /app/model.py:54 in forward, code: return self.norm(out) + x
            layer_norm: "f32[s77, 16]" = torch.nn.functional.layer_norm(out, (16,), l_self_modules_layers_modules_0_modules_norm_parameters_weight_, l_self_modules_layers_modules_0_modules_norm_parameters_bias_, 1e-05);  out = l_self_modules_layers_modules_0_modules_norm_parameters_weight_ = l_self_modules_layers_modules_0_modules_norm_parameters_bias_ = None
            add: "f32[s77, 16]" = layer_norm + l_x_;  layer_norm = l_x_ = None

            # File: /app/model.py:51 in forward, code: q = self.proj(x)
            linear: "f32[s77, 16]" = torch._C._nn.linear(add, l_self_modules_layers_modules_1_modules_proj_parameters_weight_, l_self_modules_layers_modules_1_modules_proj_parameters_bias_);  l_self_modules_layers_modules_1_modules_proj_parameters_weight_ = l_self_modules_layers_modules_1_modules_proj_parameters_bias_ = None

            # File: /app/model.py:52 in forward, code: out = torch.empty_like(q)
            empty_like: "f32[s77, 16]" = torch.empty_like(linear)
            return (linear, empty_like, add)

    class submod_3(torch.nn.Module):
        def forward(self, q_1: "f32[s77, 16]", s77: "Sym(s77)", out_1: "f32[s77, 16]"):
            # File: /app/model.py:53 in forward, code: torch.ops.toy.attention(q, out, self.name)
            attention = torch.ops.toy.attention(q_1, out_1, 'model.layers.1.self_attn.attn');  q_1 = out_1 = attention = None
            return ()

    class submod_4(torch.nn.Module):
        def forward(self, out_1: "f32[s77, 16]", s77: "Sym(s77)", l_self_modules_layers_modules_1_modules_norm_parameters_weight_: "f32[16]", l_self_modules_layers_modules_1_modules_norm_parameters_bias_: "f32[16]", x: "f32[s77, 16]", l_self_modules_layers_modules_2_modules_proj_parameters_weight_: "f32[16, 16]", l_self_modules_layers_modules_2_modules_proj_parameters_bias_: "f32[16]"):
            # File: /app/model.py:54 in forward, code: return self.norm(out) + x
            layer_norm: "f32[s77, 16]" = torch.nn.functional.layer_norm(out_1, (16,), l_self_modules_layers_modules_1_modules_norm_parameters_weight_, l_self_modules_layers_modules_1_modules_norm_parameters_bias_, 1e-05);  out_1 = l_self_modules_layers_modules_1_modules_norm_parameters_weight_ = l_self_modules_layers_modules_1_modules_norm_parameters_bias_ = None
            add: "f32[s77, 16]" = layer_norm + x;  layer_norm = x = None

            # File: /app/model.py:51 in forward, code: q = self.proj(x)
            linear: "f32[s77, 16]" = torch._C._nn.linear(add, l_self_modules_layers_modules_2_modules_proj_parameters_weight_, l_self_modules_layers_modules_2_modules_proj_parameters_bias_);  l_self_modules_layers_modules_2_modules_proj_parameters_weight_ = l_self_modules_layers_modules_2_modules_proj_parameters_bias_ = None

            # File: /app/model.py:52 in forward, code: out = torch.empty_like(q)
            empty_like: "f32[s77, 16]" = torch.empty_like(linear)
            return (linear, empty_like, add)

    class submod_5(torch.nn.Module):
        def forward(self, q_2: "f32[s77, 16]", s77: "Sym(s77)", out_2: "f32[s77, 16]"):
            # File: /app/model.py:53 in forward, code: torch.ops.toy.attention(q, out, self.name)
            attention = torch.ops.toy.attention(q_2, out_2, 'model.layers.2.self_attn.attn');  q_2 = out_2 = attention = None
            return ()

    class submod_6(torch.nn.Module):
        def forward(self, out_2: "f32[s77, 16]", s77: "Sym(s77)", l_self_modules_layers_modules_2_modules_norm_parameters_weight_: "f32[16]", l_self_modules_layers_modules_2_modules_norm_parameters_bias_: "f32[16]", x_1: "f32[s77, 16]"):
            # File: /app/model.py:54 in forward, code: return self.norm(out) + x
            layer_norm: "f32[s77, 16]" = torch.nn.functional.layer_norm(out_2, (16,), l_self_modules_layers_modules_2_modules_norm_parameters_weight_, l_self_modules_layers_modules_2_modules_norm_parameters_bias_, 1e-05);  out_2 = l_self_modules_layers_modules_2_modules_norm_parameters_weight_ = l_self_modules_layers_modules_2_modules_norm_parameters_bias_ = None
            add: "f32[s77, 16]" = layer_norm + x_1;  layer_norm = x_1 = None
            return (add,)
