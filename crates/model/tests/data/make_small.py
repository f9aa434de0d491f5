#!/usr/bin/env python3
"""Makes small_model, small_io and small_grads.safetensors: random weights for small_config.json, and what the executable
specification of the model (quasar_spec.py) computes from them: hidden states, logits and loss in f32, gradients in f64.

    python make_small.py FOLDER_OF_QUASAR_SPEC        writes into this script's folder; needs torch and safetensors
"""
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
import quasar_spec as q
here=Path(__file__).parent
config=json.loads((here/'small_config.json').read_text())
g=torch.Generator().manual_seed(11)
W={}
D,H,KV,d=32,4,2,8; E,I,M,r=8,12,8,16; V=96
def n(*s,std=0.3): return torch.randn(*s,generator=g)*std
def u(*s,a=0,b=1): return torch.rand(*s,generator=g)*(b-a)+a
W['model.word_embeddings.weight']=n(V,D,std=1.0); W['lm_head.weight']=n(V,D,std=.25); W['model.norm.weight']=1+n(D,std=.2)
W['model.rotary_emb.inv_freq']=torch.tensor([1.0,0.01])
branches={1:'quasar',2:'raven',3:'gla',4:'quasar'}
for l in range(5):
    P=f'model.layers.{l}.'; A=P+'attention.'
    W[P+'input_layernorm.weight']=1+n(D,std=.2); W[P+'post_attention_layernorm.weight']=1+n(D,std=.2)
    def fused(p):
        W[p+'query_key_value.weight']=n((H+2*KV)*d,D,std=.25); W[p+'dense.weight']=n(D,D,std=.2)
        W[p+'query_layernorm.weight']=1+n(d,std=.3); W[p+'key_layernorm.weight']=1+n(d,std=.3)
    fused(A)
    b=branches.get(l)
    if b:
        W[A+'replace_alpha_raw']=n(1,std=1); W[A+'branch_output_gain']=1+n(1,std=.2); W[A+'branch_global_output_gain']=1+n(1,std=.2)
        W[A+'branch_local_window_mix_logit']=torch.tensor([-13.8]); W[A+'branch_mix_logits']=n(3)
        W[A+'branch_output_channel_gain']=1+n(D,std=.2); W[A+'branch_output_adapter_down.weight']=n(r,D,std=.2); W[A+'branch_output_adapter_up.weight']=n(D,r,std=.2)
        p=A+b+'_attention.'
    if b=='quasar':
        for k in 'qkvfo': W[p+k+'_proj.weight']=n(D,D,std=.25)
        W[p+'b_proj.weight']=n(H,D,std=.4); W[p+'g_proj.0.weight']=n(d,D); W[p+'g_proj.1.weight']=n(D,d); W[p+'g_proj.1.bias']=n(D)
        # below the saturation of the step size, so that its gradient is tested
        W[p+'A_log']=u(H,a=-1.5,b=1.5); W[p+'dt_bias']=n(D,std=.5); W[p+'o_norm.weight']=1+n(d,std=.3)
    if b=='raven':
        W[p+'q_proj.weight']=n(D,D,std=.25); W[p+'k_proj.weight']=n(KV*d,D,std=.25); W[p+'v_proj.weight']=n(KV*d,D,std=.25)
        W[p+'r_proj.weight']=n(H*M,D,std=.3); W[p+'a_proj.weight']=n(H,D,std=.3); W[p+'o_proj.weight']=n(D,D,std=.2)
        W[p+'A_log']=u(H,a=-1,b=1.5); W[p+'dt_bias']=u(H,a=-4,b=0); W[p+'q_norm.weight']=1+n(d,std=.3); W[p+'k_norm.weight']=1+n(d,std=.3); W[p+'g_norm.weight']=1+n(D,std=.2)
    if b=='gla':
        fused(p); W[p+'g_proj.weight']=n(D,D,std=.25); W[p+'g_norm.weight']=1+n(D,std=.2)
        W[p+'slope']=torch.tensor([-2**(-8*(h+1)/H)*(1-(l-1)/4+1e-5) for h in range(H)])
    m=P+'mlp.'
    def swiglu(p,w):
        W[p+'gate_proj.weight']=n(w,D,std=.25); W[p+'up_proj.weight']=n(w,D,std=.25); W[p+'down_proj.weight']=n(D,w,std=.2)
    if l<1: swiglu(m,40)
    else:
        W[m+'experts_w12']=n(E,D,2*I,std=.25); W[m+'experts_w3']=n(E,I,D,std=.25); W[m+'gate.weight']=n(E,D,std=.3); W[m+'gate.expert_bias']=n(E,std=.05); swiglu(m+'shared_experts.',I)
ids=torch.randint(0,V,(2,150),generator=g); ids[0,5]=3; ids[1,17]=3   # the pad token occurs
trace=[]
with torch.no_grad(): logits=q.forward(ids,W,config,trace)
loss,grads,unused=q.loss_and_gradients(ids,W,config)
W64={k:v.double() for k,v in W.items()}
loss64,grads64,_=q.loss_and_gradients(ids,W64,config)
worst=sorted(((float((grads[k].double()-grads64[k]).norm()/grads64[k].norm().clamp(min=1e-30)),k) for k in grads if not q.cancels(k)),reverse=True)[:6]
print(loss,loss64,len(grads),len(unused),unused); print(worst)
t64=[]; 
with torch.no_grad(): l64=q.forward(ids,W64,config,t64)
print('fwd f32 vs f64',max(float((a-b).abs().max()) for a,b in zip(trace,t64)), float((logits-l64).abs().max()), float(logits.abs().max()))
out=str(here)+'/'
save_file({k:v.contiguous() for k,v in W.items()},out+'small_model.safetensors',metadata={'format':'pt'})
io={'input_ids':ids.to(torch.int32),'logits':logits,'loss':loss.reshape(1)}
io.update({f'hidden.{i}':x.reshape(-1,D) for i,x in enumerate(trace)})
save_file({k:v.contiguous() for k,v in io.items()},out+'small_io.safetensors')
save_file({k:v.float().contiguous() for k,v in grads64.items()},out+'small_grads.safetensors')
